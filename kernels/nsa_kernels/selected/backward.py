"""Selected attention, backward: the forward's loop order, so that each block's keys and values are read once an item.

1. `row_deltas`: delta = sum(dO * O) - dlse per (query, head), unless the caller has it.
2. `items`, one work item at a time: a block against some of the queries that chose it. It sums its own dK and dV in
   registers and leaves one fp32 page of them; each (query, block) pair leaves its part of dQ in the slot of the query.
   `backward_items`, and `hopper.backward` where `tiles.hopper_takes` says so.
3. `parts.sum_parts`: every query's dQ, its parts in the order of its list.
4. `pages`: adds up every block's items in order, and writes the page's gradient, wherever the page lies.

No atomics: two runs give the same bits.

Shapes      as `forward`, and
    dq_part     [H, T, n, G, Dk]        fp16 for 16-bit inputs, fp32 for fp32, over its largest |element|
    dq_scale    [H, T, n, G]            fp32: what to multiply a part with
    dkv_part    [items, l', Dk + Dv]    fp32
Rows        fp32 [4, T, Hq], what a program needs to know of a row side by side, so that one address finds all of it:
            softmax_lse in log2, delta, gate, and the bits of the int32 position
Gate        dO may be of a sum of branches, out = .. + gate * out_slc: then P below is gate * softmax, and delta is that
            of out_slc without its gate. No gate is 1.
Numerics    P and dS enter their products in the dtype of q; sums are fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.sizes import cdiv, split_head_dim
from nsa_kernels.contracts import SelectedCall
from nsa_kernels.selected import backward_items
from nsa_kernels.selected.hopper import backward as hopper_backward
from nsa_kernels.selected.index import BlockIndex
from nsa_kernels.selected.pages import put
from nsa_kernels.selected.parts import sum_parts
from nsa_kernels.selected.tiles import backward_tiles, hopper_takes


@launchable
@triton.jit(
    do_not_specialize=[
        "num_page_lists",
        "num_blocks",
        "head_start",
        "num_kv_heads",
        "num_local_pages",
        "num_short_pages",
    ]
)
def _pages_kernel(
    dkv_part, item_offsets, block_table, dk_short, dv_short,
    dk, dv, dk_remote, dv_remote,
    num_lists, num_page_lists, num_blocks, head_start, num_kv_heads, num_local_pages, num_short_pages, stride_table,
    DK0: tl.constexpr, DK1: tl.constexpr, DV: tl.constexpr, BLOCK_LEN: tl.constexpr,
    HAS_REMOTE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one page's gradients: its items' pages in order, on top of earlier chunks' where ADD.

    The first num_short_pages pages also take what the short way found for them, [rows, Hkv, D] in fp32.
    """
    which = tl.program_id(0)
    kv_head, block = head_start + which // num_blocks, which % num_blocks
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    k0_column, v_column = tl.arange(0, DK0)[None, :], tl.arange(0, DV)[None, :]
    WIDTH: tl.constexpr = DK0 + DK1 + DV
    dk0_sum = tl.zeros([ROWS, DK0], tl.float32)
    if DK1 > 0:
        k1_column = DK0 + tl.arange(0, DK1)[None, :]
        dk1_sum = tl.zeros([ROWS, DK1], tl.float32)
    dv_sum = tl.zeros([ROWS, DV], tl.float32)
    num_items = 0
    for one_list in range(which, num_lists, num_page_lists):  # the page's list in every segment
        begin, end = tl.load(item_offsets + one_list), tl.load(item_offsets + one_list + 1)
        source = dkv_part + (begin.to(tl.int64) * BLOCK_LEN + row) * WIDTH
        for _ in tl.range(begin, end, num_stages=3):
            dk0_sum += tl.load(source + k0_column)
            if DK1 > 0:
                dk1_sum += tl.load(source + k1_column)
            dv_sum += tl.load(source + DK0 + DK1 + v_column)
            source += BLOCK_LEN * WIDTH
        num_items += end - begin
    page = tl.load(block_table + kv_head * stride_table + block)
    is_short = (page >= 0) & (page < num_short_pages)
    if (num_items == 0) & (is_short == 0):
        return

    if dk_short is not None:
        row_short = (page.to(tl.int64) * BLOCK_LEN + row) * num_kv_heads + kv_head
        dk0_sum += tl.load(dk_short + row_short * (DK0 + DK1) + k0_column, mask=is_short, other=0.0)
        if DK1 > 0:
            dk1_sum += tl.load(dk_short + row_short * (DK0 + DK1) + k1_column, mask=is_short, other=0.0)
        dv_sum += tl.load(dv_short + row_short * DV + v_column, mask=is_short, other=0.0)
    if not HAS_REMOTE:  # every page is local: the branch below is never taken
        dk_remote, dv_remote = dk, dv
    if page >= num_local_pages:
        at = (page - num_local_pages).to(tl.int64) * BLOCK_LEN + row
        put(dk_remote + at * (DK0 + DK1) + k0_column, dk0_sum, ADD)
        if DK1 > 0:
            put(dk_remote + at * (DK0 + DK1) + k1_column, dk1_sum, ADD)
        put(dv_remote + at * DV + v_column, dv_sum, ADD)
    else:
        at = (page.to(tl.int64) * BLOCK_LEN + row) * num_kv_heads + kv_head
        put(dk + at * (DK0 + DK1) + k0_column, dk0_sum, ADD)
        if DK1 > 0:
            put(dk + at * (DK0 + DK1) + k1_column, dk1_sum, ADD)
        put(dv + at * DV + v_column, dv_sum, ADD)


@launchable
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


def differentiate_chunk(
    call: SelectedCall,
    index: BlockIndex,
    grad_out: Tensor,
    rows: Tensor,
    dq: Tensor,
    page_grads: Sequence[Tensor | None],
    *,
    head_start: int,
    add: bool,
    short: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill dq for a chunk of queries and heads, and write, or add where `add`, their share of dk and dv.

    The tensors of the call but pages and table, grad_out and dq are the chunk's queries with all heads, rows [4, T, Hq]
    what `pack_rows` made of them; page_grads is dk, dv [R, Hkv, D] and dk_remote, dv_remote [pages, l', D], contiguous,
    zero where no chunk has written. short is fp32 dk, dv [r, Hkv, D] of the first rows of k and v, to be added.
    """
    q, k, v, k_remote, v_remote, block_indices, block_table, _, slc_block_len, softmax_scale = call
    num_queries, num_slots = block_indices.shape[0], block_indices.shape[2]
    head_dim_k, head_dim_v = q.shape[2], v.shape[2]
    num_blocks, num_kv_heads = block_table.shape[1], k.shape[1]
    num_heads = index.num_lists // (index.num_segments * num_blocks)
    group = q.shape[1] // num_kv_heads
    part_shape = (num_heads, num_queries, num_slots, group)
    part_dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
    dq_part = torch.empty(*part_shape, head_dim_k, dtype=part_dtype, device=q.device)
    dq_scale = torch.zeros(part_shape, dtype=torch.float32, device=q.device)  # 0: no part
    dkv_part = torch.empty(
        index.max_items, slc_block_len, head_dim_k + head_dim_v, dtype=torch.float32, device=q.device
    )
    on_hopper = hopper_takes(q, k, v, block_indices, slc_block_len, (q, grad_out))
    (hopper_backward if on_hopper else backward_items).launch_items(
        q, k, v, k_remote, v_remote, grad_out, rows, block_table, index, dq_part, dq_scale, dkv_part,
        head_start=head_start, softmax_scale=softmax_scale,
    )  # fmt: skip
    tiles = backward_tiles(group, head_dim_k, head_dim_v)
    sum_parts(dq_part, dq_scale, dq, head_start, rows=tiles.sum_rows, stages=tiles.sum_stages)
    dk0, dk1 = split_head_dim(head_dim_k)
    rows_at_once = min(16, slc_block_len)
    num_page_lists = num_heads * num_blocks
    _pages_kernel[(num_page_lists, slc_block_len // rows_at_once)](
        dkv_part, index.item_offsets, block_table, *(short or (None, None)),
        *page_grads,
        index.num_lists, num_page_lists, num_blocks, head_start, num_kv_heads, k.shape[0] // slc_block_len,
        0 if short is None else short[0].shape[0] // slc_block_len, block_table.stride(0),
        DK0=dk0, DK1=dk1, DV=head_dim_v, BLOCK_LEN=slc_block_len, HAS_REMOTE=k_remote is not None,
        ADD=add, ROWS=rows_at_once,
    )  # fmt: skip
