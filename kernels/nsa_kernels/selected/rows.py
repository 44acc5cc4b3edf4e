"""What the backward of selected attention needs to know of a row, side by side: one address finds all of it.

rows    fp32 [4, T, Hq]     softmax_lse in log2, delta, gate, and the bits of the int32 position
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.sizes import cdiv


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _pack_kernel(
    lse, delta, gate, position,
    rows,
    num_rows, num_heads, stride_lt, stride_lh, stride_dt, stride_dh, stride_gt, stride_gh, stride_pt,
    HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    t, h = row // num_heads, row % num_heads
    lse_row = tl.load(lse + t * stride_lt + h * stride_lh, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + row, lse_row * 1.4426950408889634, mask=inside)
    delta_row = tl.load(delta + t * stride_dt + h * stride_dh, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + num_rows.to(tl.int64) + row, delta_row, mask=inside)
    gate_row = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_GATE:
        gate_row = tl.load(gate + t * stride_gt + h * stride_gh, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + 2 * num_rows.to(tl.int64) + row, gate_row, mask=inside)
    place = tl.load(position + t * stride_pt, mask=inside, other=-1).to(tl.int32)
    tl.store(rows + 3 * num_rows.to(tl.int64) + row, place.to(tl.float32, bitcast=True), mask=inside)


def pack_rows(lse: Tensor, delta: Tensor, gate: Tensor | None, position: Tensor) -> Tensor:
    """The rows of all queries: lse, delta and gate [T, Hq] of any strides, position integer [T]; no gate is 1."""
    rows = torch.empty(4, *lse.shape, dtype=torch.float32, device=lse.device)
    num_rows = lse.numel()
    if num_rows:
        _pack_kernel[(cdiv(num_rows, 1024),)](
            lse, delta, gate, position,
            rows,
            num_rows, lse.shape[1], *lse.stride(), *delta.stride(), *(gate.stride() if gate is not None else (0, 0)),
            position.stride(0),
            HAS_GATE=gate is not None, BLOCK=1024,
        )  # fmt: skip
    return rows
