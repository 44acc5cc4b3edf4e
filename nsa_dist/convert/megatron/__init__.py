"""A dense model out of a checkpoint that Megatron-LM wrote in its `torch_dist` format."""
