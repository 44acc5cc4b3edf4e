"""What one decoding step of a cache over ranks sends, by kind."""

import torch

from nsa_dist.inference.pool import CmpPlacement
from nsa_dist.inference.storage import CacheShape


def decode_bytes(
    shape: CacheShape,
    *,
    num_q_heads: int,
    num_sequences: int,
    new: int,
    cp_size: int,
    dtype: torch.dtype,
    placement: CmpPlacement,
    on_gpu: bool = False,
) -> dict[str, int]:
    """Bytes that a rank sends to the P - 1 others, an all-gather for each kind, with T = num_sequences * new tokens and
    numbers of W bytes. Compressed rows that are replicated:

        partials    T * Hq * (Dv + 1) * W + told                (out, softmax_lse) of the selected branch

    and sharded:

        lse         T * Hq * W + told                           softmax_lse of the compressed branch
        candidates  T * Hkv * n * 2 * W                         importances and ids
        partials    T * Hq * 2 * (Dv + 1) * W                   (out, softmax_lse) of two branches

    W is 4, or 8 for fp64; told, 8 * (2 * num_sequences + 1), is compared. None of it grows with the context. On a GPU
    nothing is compared, and kernels send keys of 8 bytes for n candidates, rounded up to a power of two.
    """
    tokens, wide = num_sequences * new, max(4, dtype.itemsize)
    told = 0 if on_gpu else 8 * (2 * num_sequences + 1)
    partial = tokens * num_q_heads * (shape.head_dim_v + 1) * wide
    chosen = shape.cfg.num_slc_blocks
    if on_gpu:
        chosen = max(2, 1 << (chosen - 1).bit_length())
    if placement == "replicated":
        sent = {"partials": partial + told}
    else:
        sent = {
            "lse": tokens * num_q_heads * wide + told,
            "candidates": tokens * shape.num_kv_heads * chosen * 2 * wide,
            "partials": 2 * partial,
        }
    return {kind: (cp_size - 1) * count for kind, count in sent.items()}
