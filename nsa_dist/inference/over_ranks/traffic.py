"""What one decoding step of a cache over ranks sends, by kind."""

import torch

from nsa_dist.inference.storage import CacheShape


def decode_bytes(
    shape: CacheShape, *, num_q_heads: int, num_sequences: int, new: int, cp_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that a rank sends to the P - 1 others, with T = num_sequences * new tokens and numbers of W bytes:

        lse         T * Hq * W + 8 * (2 * num_sequences + 1)    softmax_lse of the compressed branch; what is compared
        candidates  T * Hkv * n * 2 * W                         importances and ids
        partials    T * Hq * 2 * (Dv + 1) * W                   (out, softmax_lse) of two branches

    W is 4, or 8 for fp64. None of it grows with the context.
    """
    tokens, wide = num_sequences * new, max(4, dtype.itemsize)
    sent = {
        "lse": tokens * num_q_heads * wide + 8 * (2 * num_sequences + 1),
        "candidates": tokens * shape.num_kv_heads * shape.cfg.num_slc_blocks * 2 * wide,
        "partials": tokens * num_q_heads * 2 * (shape.head_dim_v + 1) * wide,
    }
    return {kind: (cp_size - 1) * count for kind, count in sent.items()}
