"""From a dense model, in a folder of Hugging Face's or a checkpoint of Megatron-LM's, to one of NSA layers in a folder
that `nsa_dist.inference` reads."""
