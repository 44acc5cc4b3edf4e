"""Use what was trained: a paged cache of one layer, prefill and decode with it.

The operators are those of training (`ops`); kernels made for decoding can stand behind the same two functions.
"""

from nsa_dist.inference.attend import nsa_decode, nsa_prefill
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.pool import CacheFullError

__all__ = ["CacheFullError", "NSACache", "nsa_decode", "nsa_prefill"]
