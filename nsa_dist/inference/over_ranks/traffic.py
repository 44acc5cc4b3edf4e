"""What one decoding step of a cache over ranks sends, by kind."""

import torch

from nsa_dist.inference.storage import CacheShape


def decode_bytes(
    shape: CacheShape,
    *,
    num_q_heads: int,
    num_sequences: int,
    new: int,
    cp_size: int,
    dtype: torch.dtype,
    on_gpu: bool = False,
) -> dict[str, int]:
    """Bytes that a rank sends to the P - 1 others, with T = num_sequences * new tokens and numbers of W bytes:

        lse         T * Hq * W + 8 * (2 * num_sequences + 1)    softmax_lse of the compressed branch; what is compared
        candidates  T * Hkv * n * 2 * W                         importances and ids
        partials    T * Hq * 2 * (Dv + 1) * W                   (out, softmax_lse) of two branches

    W is 4, or 8 for fp64. None of it grows with the context. On a GPU nothing is compared, and kernels send keys of 8
    bytes for n candidates, rounded up to a power of two.
    """
    tokens, wide = num_sequences * new, max(4, dtype.itemsize)
    chosen = shape.cfg.num_slc_blocks
    if on_gpu:
        chosen = max(2, 1 << (chosen - 1).bit_length())
    sent = {
        "lse": tokens * num_q_heads * wide + (0 if on_gpu else 8 * (2 * num_sequences + 1)),
        "candidates": tokens * shape.num_kv_heads * chosen * 2 * wide,
        "partials": tokens * num_q_heads * 2 * (shape.head_dim_v + 1) * wide,
    }
    return {kind: (cp_size - 1) * count for kind, count in sent.items()}
