"""The first launch of attention: splits of the compressed branch, parts of the window, and, if asked, what is new
into pages and rings. None of them waits for another, so they share the card.

Programs    compressed splits of all sequences, the longest work, then parts of the window, then a program a new token.
            Those past a sequence's end leave at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.common.launch import launchable
from nsa_kernels.common.overlap import overlapping, wait
from nsa_kernels.common.rows import token_head_strides
from nsa_kernels.common.sizes import cdiv, next_power_of_2, split_head_dim
from nsa_kernels.common.tiles import dot_precision
from nsa_kernels.decode.append import num_whole, write_token
from nsa_kernels.decode.compressed import LOG2_E, CompressedParts, compressed_split
from nsa_kernels.decode.tiles import Split, block_rows, compressed_options, reads_pages_ahead
from nsa_kernels.decode.window import Parts, window_part
from nsa_kernels.decode_contracts import DecodeSizes, PagedCache


@launchable
@triton.jit
def _first_kernel(
    q_ptr, k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, slots_ptr, page_table_ptr, lengths_ptr,
    k_cell_ptr, v_cell_ptr, k_page_ptr, v_page_ptr, k_win_ring_ptr, v_win_ring_ptr, k_raw_ring_ptr, v_raw_ring_ptr,
    ends_ptr, max_ptr, sum_ptr, out_ptr, imp_ptr, tile_max_ptr, win_max_ptr, win_sum_ptr, win_out_ptr,
    batch_size, new, num_heads, max_pages, num_splits, num_tiles, win_ring, raw_ring, win_parts, scale,
    k_scale, k_inverse, v_inverse, stride_qt, stride_qh,
    stride_kct, stride_kch, stride_vct, stride_vch, stride_kst, stride_ksh, stride_vst, stride_vsh,
    stride_kwt, stride_kwh, stride_vwt, stride_vwh,
    IS_APPENDED: tl.constexpr, G: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, G_PAD: tl.constexpr,
    CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr, CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr,
    SLC_PAD: tl.constexpr, NUM_LAYERS: tl.constexpr, TILE_PAGES: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    SLC_LEN: tl.constexpr, WINDOW: tl.constexpr, PART_BLOCKS: tl.constexpr,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, PAGES_AHEAD: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """IS_APPENDED: pages and rings have what is new already."""
    of_cmp = num_heads * ROW_TILES * num_splits  # programs of a sequence
    of_win = num_heads * new * win_parts
    program = tl.program_id(0)
    is_cmp = program < batch_size * of_cmp
    program = tl.where(is_cmp, program, program - batch_size * of_cmp)
    is_win = (program < batch_size * of_win) & (is_cmp == 0)
    is_new = (program >= batch_size * of_win) & (is_cmp == 0)
    program = tl.where(is_new, program - batch_size * of_win, program)
    of = tl.where(is_cmp, of_cmp, tl.where(is_win, of_win, new))
    batch = (program // of).to(tl.int64)
    program = program % of
    head, split = program % num_heads, program // num_heads // ROW_TILES
    wait(OVERLAPS)
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    length = tl.load(lengths_ptr + tl.maximum(slot, 0))
    table = page_table_ptr + tl.maximum(slot, 0) * max_pages
    where = tl.zeros([SLC_PAD * TILE_PAGES], tl.int32)
    if PAGES_AHEAD:  # beside the length, and not behind it; pages past the sequence's last are not used
        page = split * SPLIT_PAGES + tl.arange(0, SLC_PAD * TILE_PAGES) % TILE_PAGES
        where = tl.load(table + page, mask=is_cmp & (page < max_pages), other=0)
    end = tl.where(slot >= 0, length + new, 0)
    if is_cmp:
        if program == 0:
            tl.store(ends_ptr + batch, end)
        num_cells = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1, 0)
        if split * SPLIT_PAGES * CELLS_SLC < num_cells:
            row = program // num_heads % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
            compressed_split(
                q_ptr, k_cell_ptr, v_cell_ptr, table, where, max_ptr, sum_ptr, out_ptr, imp_ptr, tile_max_ptr,
                batch, head, split, row, end, new, num_heads, num_splits, num_tiles, scale * k_scale,
                stride_qt, stride_qh,
                G, BLOCK_M, CMP_LEN, CMP_STRIDE, CELLS_CMP, CELLS_SLC, SLC_PAD, NUM_LAYERS, TILE_PAGES, SPLIT_PAGES,
                DK_A, DK_B, DV, PRECISION, PAGES_AHEAD, OVERLAPS,
            )  # fmt: skip
    elif end > 0:
        if is_win:
            query = batch * new + program // num_heads // win_parts
            part = program // num_heads % win_parts
            window_part(
                q_ptr, k_win_ptr, v_win_ptr, k_win_ring_ptr, v_win_ring_ptr, win_max_ptr, win_sum_ptr, win_out_ptr,
                query, head, part, slot, length, end if IS_APPENDED else length, new, num_heads, win_ring, win_parts,
                scale, stride_qt, stride_qh, stride_kwt, stride_kwh, stride_vwt, stride_vwh,
                G, G_PAD, SLC_LEN, WINDOW, PART_BLOCKS, DK_A, DK_B, DV, PRECISION,
            )  # fmt: skip
        else:
            write_token(
                k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, table,
                k_page_ptr, v_page_ptr, k_win_ring_ptr, v_win_ring_ptr, k_raw_ring_ptr, v_raw_ring_ptr,
                batch * new + program, slot, length + program, num_heads, win_ring, raw_ring, k_inverse, v_inverse,
                stride_kct, stride_kch, stride_vct, stride_vch, stride_kst, stride_ksh, stride_vst, stride_vsh,
                stride_kwt, stride_kwh, stride_vwt, stride_vwh,
                SLC_LEN, DK_A + DK_B, DV, BLOCK_K, BLOCK_V,
            )  # fmt: skip


def attend_first(
    q: Tensor, given: list[Tensor] | None, cache: PagedCache, slots: Tensor, ends: Tensor, cut: Split,
    win_blocks: int, sizes: DecodeSizes, softmax_scale: float,
) -> tuple[CompressedParts, Parts]:  # fmt: skip
    """q [B, new, Hq, Dk], its last stride 1; writes `ends`.

    given       k_cmp, v_cmp, k_slc, v_slc, k_win, v_win [B * new, Hkv, D]; None: pages and rings have them
    """
    batch, new, num_q_heads, dim_k = q.shape
    num_heads, dim_v = cache.v_cmp.shape[2:]
    max_pages, group = cache.page_table.shape[1], num_q_heads // num_heads
    compressed = CompressedParts.empty((batch, num_heads, new * group), sizes.num_layers, max_pages, dim_v, cut, q)
    win_parts = cdiv(sizes.window_len, sizes.slc_block_len * win_blocks)
    window = Parts.empty((batch, new, num_q_heads), win_parts, dim_v, q)
    block_m = block_rows(new * group)
    row_tiles = cdiv(new * group, block_m)
    packed, (dk_a, dk_b) = q.flatten(0, 1), split_head_dim(dim_k)
    unread = [x.flatten(0, 1) for x in (cache.k_win, cache.v_win)] * 3
    tokens = given or unread
    programs = num_heads * (row_tiles * cut.num_splits + new * win_parts) + (new if given else 0)
    _first_kernel[(batch * programs,)](
        packed, *tokens, slots, cache.page_table, cache.lengths,
        cache.k_cmp, cache.v_cmp, cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, cache.k_raw, cache.v_raw,
        ends, *compressed, *window,
        batch, new, num_heads, max_pages, cut.num_splits, compressed.tile_max.shape[3], cache.k_win.shape[1],
        cache.k_raw.shape[1], win_parts, softmax_scale * LOG2_E, cache.k_scale, 1 / cache.k_scale, 1 / cache.v_scale,
        *packed.stride()[:2], *token_head_strides(*tokens),
        IS_APPENDED=given is None, G=group, ROW_TILES=row_tiles, BLOCK_M=block_m,
        G_PAD=max(16, next_power_of_2(group)),
        CMP_LEN=sizes.cmp_block_len, CMP_STRIDE=sizes.cmp_stride, CELLS_CMP=sizes.cells_cmp,
        CELLS_SLC=sizes.cells_slc, SLC_PAD=next_power_of_2(sizes.cells_slc), NUM_LAYERS=sizes.num_layers,
        TILE_PAGES=cut.tile_pages, SPLIT_PAGES=cut.split_pages,
        SLC_LEN=sizes.slc_block_len, WINDOW=sizes.window_len, PART_BLOCKS=win_blocks,
        DK_A=dk_a, DK_B=dk_b, DV=dim_v, BLOCK_K=next_power_of_2(num_heads * dim_k),
        BLOCK_V=next_power_of_2(num_heads * dim_v), PRECISION=dot_precision(q.dtype),
        PAGES_AHEAD=reads_pages_ahead(batch * num_heads, cut), **compressed_options(q.dtype, block_m),
        **overlapping(q),
    )  # fmt: skip
    return compressed, window
