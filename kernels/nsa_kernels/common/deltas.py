"""delta of an attention's backward: what the softmax takes off every dP of a row.

    delta[t, h] = sum_d dO[t, h, d] * O[t, h, d] - dlse[t, h]          dS = P * (dP - delta)

A gradient that arrives for softmax_lse only shifts delta, since d lse / d s = P.

Shapes      out, grad_out [T, H, D] with unit stride in the last dim, D a power of two; grad_lse [T, H] or None
Numerics    fp32
Source      Dao 2023, arXiv:2307.08691, section 3.1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv


@launchable
@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _delta_kernel(
    out, grad_out, grad_lse,
    delta,
    num_rows, num_heads, stride_ot, stride_oh, stride_gt, stride_gh, stride_lt, stride_lh,
    DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < num_rows
    t, h = row // num_heads, row % num_heads
    column = tl.arange(0, DV)[None, :]
    o = tl.load(out + (t * stride_ot + h * stride_oh)[:, None] + column, mask=live[:, None], other=0.0).to(tl.float32)
    g = tl.load(grad_out + (t * stride_gt + h * stride_gh)[:, None] + column, mask=live[:, None], other=0.0)
    g = g.to(tl.float32)
    result = tl.sum(o * g, 1)
    if HAS_GRAD_LSE:
        result -= tl.load(grad_lse + t * stride_lt + h * stride_lh, mask=live, other=0.0)
    tl.store(delta + row, result, mask=live)


def row_deltas(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """sum(dO * O) - dlse, fp32 [T, Hq]. grad_out needs unit stride in its last dim."""
    num_queries, num_heads, head_dim = out.shape
    delta = torch.empty(num_queries, num_heads, dtype=torch.float32, device=out.device)
    rows = num_queries * num_heads
    lse_strides = grad_lse.stride() if grad_lse is not None else (0, 0)
    if rows == 0:
        return delta
    _delta_kernel[(cdiv(rows, 64),)](
        out, grad_out, grad_lse,
        delta,
        rows, num_heads, *out.stride()[:2], *grad_out.stride()[:2], *lse_strides,
        DV=head_dim, HAS_GRAD_LSE=grad_lse is not None, BLOCK_M=64,
    )  # fmt: skip
    return delta
