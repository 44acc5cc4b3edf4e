"""Token sets: texts cut into tokens once, in Megatron's files, by a tokenizer of bytes or of Hugging Face's."""
