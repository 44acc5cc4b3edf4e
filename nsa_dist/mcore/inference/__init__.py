"""Megatron-core's inference contexts, and the cache of `nsa_dist.inference` behind them."""
