"""NSA as the attention layer of Megatron-core's HybridModel (0.19 and later): `stack.nsa_stack_spec`.

Megatron-core 0.16 has no HybridModel, so nothing is imported here.
"""
