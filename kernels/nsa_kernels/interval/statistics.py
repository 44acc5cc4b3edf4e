"""What the backward of compressed attention needs of each row, in the order in which its tiles take rows.

    statistics [3, Hkv, R]    fp32; row r of a key-value head is query r // G, head r % G of the group
        [0]  softmax_lse in units of log 2; +inf for a row without keys, whose P = exp2(S - inf) is then 0
        [1]  delta
        [2]  the gate, or 1

A row without keys has delta and gate 0, so that no NaN that arrives for it, or for its lse of -inf, goes on.
R is T * G made up to a multiple of BLOCK_ROWS by rows without keys. So a tile reads 3 * BLOCK_M neighbouring numbers,
whatever the strides of the caller's tensors, and none beyond.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv
from nsa_kernels.common.tiles import row_offsets

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK_ROWS = 1024


@launchable
@triton.jit
def _statistics_kernel(
    lse_ptr, delta_ptr, gate_ptr, begin_ptr, end_ptr,
    out_ptr,
    num_rows, num_padded_rows, stride_lt, stride_lh, stride_dt, stride_dh, stride_gt, stride_gh,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    seen = tl.load(begin_ptr + row // G, mask=live, other=0) < tl.load(end_ptr + row // G, mask=live, other=0)
    lse = tl.load(lse_ptr + row_offsets(row, head, stride_lt, stride_lh, G), mask=live, other=0.0)
    delta = tl.load(delta_ptr + row_offsets(row, head, stride_dt, stride_dh, G), mask=live, other=0.0)
    out = out_ptr + head.to(tl.int64) * num_padded_rows + row
    plane = tl.cast(tl.num_programs(1), tl.int64) * num_padded_rows
    tl.store(out, tl.where(seen, lse * LOG2_E, float("inf")))
    tl.store(out + plane, tl.where(seen, delta, 0.0))
    if gate_ptr is None:
        gate = tl.full([BLOCK], 1.0, tl.float32)
    else:
        gate = tl.load(gate_ptr + row_offsets(row, head, stride_gt, stride_gh, G), mask=live, other=0.0).to(tl.float32)
    tl.store(out + 2 * plane, tl.where(seen, gate, 0.0))


@triton.jit
def load_statistics(statistics_ptr, row, head, num_padded_rows, num_heads_kv):
    """lse in units of log 2, delta and gate of the rows `row` of key-value head `head`."""
    at = statistics_ptr + head.to(tl.int64) * num_padded_rows + row
    plane = tl.cast(num_heads_kv, tl.int64) * num_padded_rows
    return tl.load(at), tl.load(at + plane), tl.load(at + 2 * plane)


def row_statistics(
    softmax_lse: Tensor, delta: Tensor, gate: Tensor | None, begin: Tensor, end: Tensor, num_kv_heads: int
) -> Tensor:
    """softmax_lse, delta and gate [T, Hq] of any strides (no gate: 1) as fp32 [3, Hkv, R]."""
    num_queries, num_q_heads = softmax_lse.shape
    group = num_q_heads // num_kv_heads
    num_tiles = cdiv(num_queries * group, BLOCK_ROWS)
    out = torch.empty(3, num_kv_heads, num_tiles * BLOCK_ROWS, dtype=torch.float32, device=softmax_lse.device)
    _statistics_kernel[(num_tiles, num_kv_heads)](
        softmax_lse, delta, gate, begin, end,
        out,
        num_queries * group, out.shape[2],
        *softmax_lse.stride(), *delta.stride(), *((0, 0) if gate is None else gate.stride()),
        G=group, BLOCK=BLOCK_ROWS,
    )  # fmt: skip
    return out
