"""Decoding from a paged cache in plain PyTorch, sequence by sequence: the twin of `nsa_kernels.decode`.

The keys and values of each sequence are put in a row, in the order of its tokens, and the branches' equations applied
to the new tokens; lengths are read on the host. Same names, shapes and results as the kernels; any dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_kernels.decode_contracts import Appended, DecodeSizes, PagedCache, from_pages, in_pages
from nsa_kernels.reference.gates import combine
from nsa_kernels.reference.interval import compressed_attention, window_attention
from nsa_kernels.reference.phi import compress_mean, compress_mlp
from nsa_kernels.reference.selected import selected_attention
from nsa_kernels.reference.selection import select_blocks


def num_whole(length: int, sizes: DecodeSizes) -> int:
    """Compressed blocks of a sequence of `length` tokens."""
    return max(0, (length - sizes.cmp_block_len) // sizes.cmp_stride + 1)


@torch.no_grad()
def decode_append(
    k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    cache: PagedCache, slots: Tensor, *, sizes: DecodeSizes,
) -> Appended:  # fmt: skip
    """As the kernel; places without a block that has become whole hold zeros."""
    batch, new = k_cmp.shape[:2]
    num_fresh = -(-new // sizes.cmp_stride)
    ends = torch.zeros_like(slots)
    starts = slots.new_zeros(batch * num_fresh, dtype=torch.int64)
    cell_rows = slots.new_full((batch * num_fresh,), -1)
    raw = [x.new_zeros(batch * num_fresh, sizes.cmp_block_len, *x.shape[2:]) for x in (k_cmp, v_cmp)]
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        length = int(cache.lengths[slot])
        ends[b] = length + new
        for i in range(new):
            page = int(cache.page_table[slot, (length + i) // sizes.slc_block_len])
            for x, pages, scale in ((k_slc, cache.k_slc, cache.k_scale), (v_slc, cache.v_slc, cache.v_scale)):
                pages[page, (length + i) % sizes.slc_block_len] = in_pages(x[b, i], scale, pages.dtype)
            for x, ring in (
                (k_win, cache.k_win), (v_win, cache.v_win), (k_cmp, cache.k_raw), (v_cmp, cache.v_raw)
            ):  # fmt: skip
                ring[slot, (length + i) % ring.shape[1]] = x[b, i]
        had = num_whole(length, sizes)
        for i in range(num_whole(length + new, sizes) - had):
            start = (had + i) * sizes.cmp_stride
            starts[b * num_fresh + i] = start
            page, row = divmod(had + i + sizes.cells_cmp - 1, sizes.cells_slc)
            cell_rows[b * num_fresh + i] = cache.page_table[slot, page] * sizes.cells_slc + row
            for rows, ring in zip(raw, (cache.k_raw, cache.v_raw), strict=True):
                token = torch.arange(start, start + sizes.cmp_block_len, device=rows.device)
                rows[b * num_fresh + i] = ring[slot, token % ring.shape[1]]
    block_rows = torch.arange(batch * num_fresh, device=slots.device, dtype=torch.int32) * sizes.cmp_block_len
    k_raw, v_raw = (x.flatten(0, 1) for x in raw)
    return Appended(ends, k_raw, v_raw, block_rows, starts, cell_rows)


@torch.no_grad()
def decode_store(k: Tensor, v: Tensor, appended: Appended, cache: PagedCache) -> None:
    whole = appended.cell_rows >= 0
    rows = appended.cell_rows[whole].long()
    for x, pages, scale in ((k, cache.k_cmp, cache.k_scale), (v, cache.v_cmp, cache.v_scale)):
        for row, y in zip(rows.tolist(), in_pages(x[whole], scale, pages.dtype), strict=True):
            pages.view(-1, *pages.shape[2:])[row] = y


@torch.no_grad()
def decode_compress_mlp(
    appended: Appended, cache: PagedCache, phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...],
    turn_k: Tensor | None = None, turn_v: Tensor | None = None,
) -> None:  # fmt: skip
    k, v = (compress_mlp(x, appended.block_rows, *phi) for x, phi in ((appended.k_raw, phi_k), (appended.v_raw, phi_v)))
    decode_store(turned(k, appended, turn_k), turned(v, appended, turn_v), appended, cache)


@torch.no_grad()
def decode_compress_mean(
    appended: Appended, cache: PagedCache, turn_k: Tensor | None = None, turn_v: Tensor | None = None
) -> None:
    block_len = len(appended.k_raw) // len(appended.cell_rows)
    k, v = (compress_mean(x, appended.block_rows, block_len) for x in (appended.k_raw, appended.v_raw))
    decode_store(turned(k, appended, turn_k), turned(v, appended, turn_v), appended, cache)


def turned(y: Tensor, appended: Appended, turn: Tensor | None) -> Tensor:
    """Compressed rows [M, Hkv, D] turned by the position of each block, in y's dtype or fp32; rounded to y's."""
    if turn is None:
        return y
    *angles, factor = turn.tolist()
    half, dtype = len(angles), torch.promote_types(y.dtype, torch.float32)
    angle = appended.block_start.double()[:, None, None] * turn[:-1]
    cos, sin = (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)
    first, second, rest = y.to(dtype).split([half, half, y.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(y.dtype)


@torch.no_grad()
def decode_attention(
    q: Tensor, gates: Tensor, appended: Appended, cache: PagedCache, slots: Tensor,
    *, sizes: DecodeSizes, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, new, num_q_heads, _ = q.shape
    num_heads, dim_v = cache.v_slc.shape[2:]
    out = q.new_zeros(batch, new, num_q_heads, dim_v)
    block_indices = slots.new_full((batch, new, num_heads, sizes.num_slc_blocks), -1)
    for b, (slot, end) in enumerate(zip(slots.tolist(), appended.ends.tolist(), strict=True)):
        if slot >= 0:
            out[b], block_indices[b] = _attend(q[b], gates[b], cache, slot, end, sizes, softmax_scale)
            cache.lengths[slot] = end
    return out, block_indices


def decode_append_and_attend(
    q: Tensor, gates: Tensor, kv: Sequence[Tensor], cache: PagedCache, slots: Tensor,
    *, sizes: DecodeSizes, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv
    appended = decode_append(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, cache, slots, sizes=sizes)
    return decode_attention(q, gates, appended, cache, slots, sizes=sizes, softmax_scale=softmax_scale)


def _attend(q: Tensor, gates: Tensor, cache: PagedCache, slot: int, end: int, sizes: DecodeSizes, scale: float):
    """out [new, Hq, Dv] and block_indices [new, Hkv, n] of the last tokens of one sequence of `end` tokens."""
    new, length = len(q), sizes.slc_block_len
    pages = cache.page_table[slot, : -(-end // length)].long()
    position = torch.arange(end - new, end, device=q.device, dtype=torch.int32)
    zeros = torch.zeros_like(position)

    scales = cache.k_scale, cache.v_scale
    cells = [_gathered(*x, pages, q.dtype) for x in zip((cache.k_cmp, cache.v_cmp), scales, strict=True)]
    first = sizes.cells_cmp - 1
    k_cmp, v_cmp = (x[first : first + num_whole(end, sizes)] for x in cells)
    seen = torch.tensor([num_whole(int(p) + 1, sizes) for p in position], device=q.device, dtype=torch.int32)
    out_cmp, lse = compressed_attention(q, k_cmp, v_cmp, zeros, seen, softmax_scale=scale)
    block_indices = select_blocks(
        q, k_cmp, lse, zeros, seen, position, zeros, softmax_scale=scale,
        cmp_block_len=sizes.cmp_block_len, cmp_stride=sizes.cmp_stride, slc_block_len=length,
        num_slc_blocks=sizes.num_slc_blocks, num_init_blocks=sizes.num_init_blocks,
        num_local_blocks=sizes.num_local_blocks,
    )  # fmt: skip

    tokens = [_gathered(*x, pages, q.dtype) for x in zip((cache.k_slc, cache.v_slc), scales, strict=True)]
    k_slc, v_slc = (torch.cat([x[:end], x.new_zeros(len(x) - end, *x.shape[1:])]) for x in tokens)
    table = torch.arange(len(pages), device=q.device, dtype=torch.int32).expand(k_slc.shape[1], -1)
    out_slc, _ = selected_attention(
        q, k_slc, v_slc, block_indices, table, position, slc_block_len=length, softmax_scale=scale
    )
    begin = (position - (sizes.window_len - 1)).clamp(min=0)
    token = torch.arange(int(begin[0]), end, device=q.device)
    k_win, v_win = (x[slot, token % x.shape[1]] for x in (cache.k_win, cache.v_win))
    out_win, _ = window_attention(q, k_win, v_win, begin - begin[0], position + 1 - begin[0], softmax_scale=scale)
    return combine(gates, out_cmp, out_slc, out_win), block_indices


def _gathered(x: Tensor, scale: float, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of some pages, one behind the other."""
    if x.dtype != torch.float8_e4m3fn:
        return x[pages].flatten(0, 1)
    return from_pages(x.view(torch.uint8)[pages].view(x.dtype).flatten(0, 1), scale, dtype)
