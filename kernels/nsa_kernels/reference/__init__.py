"""Native Sparse Attention in plain PyTorch: the one truth that every kernel and parallel path is held to.

Written from the equations of arXiv 2502.11089, in any floating dtype (fp64 included) on any device. Nothing here
imports a kernel. Memory is bounded by working on chunks of queries; backward recomputes each chunk.

Shapes      `nsa_kernels.contracts`
Numerics    bf16 and fp16 are computed in fp32 and rounded once, to the dtype of q. `softmax_lse` is the natural log,
            fp32 (fp64 for fp64 inputs). A row that sees no key is (out = 0, softmax_lse = -inf).
"""

from nsa_kernels.reference.gates import combine, gate_deltas, merge, sum_branches
from nsa_kernels.reference.interval import (
    compressed_attention,
    compressed_attention_backward,
    window_attention,
    window_attention_backward,
)
from nsa_kernels.reference.phi import compress_mean, compress_mlp, compress_mlp_pair
from nsa_kernels.reference.phi import gather_blocks as gather_blocks
from nsa_kernels.reference.selected import selected_attention, selected_attention_backward
from nsa_kernels.reference.selection import overlap_weights as overlap_weights
from nsa_kernels.reference.selection import select_blocks

__all__ = [
    "combine",
    "compress_mean",
    "compress_mlp",
    "compress_mlp_pair",
    "compressed_attention",
    "compressed_attention_backward",
    "gate_deltas",
    "merge",
    "select_blocks",
    "selected_attention",
    "selected_attention_backward",
    "sum_branches",
    "window_attention",
    "window_attention_backward",
]
