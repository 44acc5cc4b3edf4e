"""Attention of one to eight new tokens a sequence to a paged cache, all branches: the public face of decoding.

    decode_append      new keys and values into pages and rings; tokens of blocks that have become whole, for phi
    decode_compress_mlp, decode_compress_mean      phi, into their pages; or any function of a fixed shape, and then
    decode_store       its results
    decode_attention   three launches: compressed attention in splits, and the window; candidates, and the two merged;
                       selected attention, and the output

`decode_append_and_attend` is the first and the last of them, in three launches, for steps without the others.

Grids follow from shapes alone, the number of sequences and the width of the page table, and lengths are read on the
device: a CUDA graph of these steps stays valid while sequences grow, come and go in their slots. Programs past the
end of a short sequence leave at once. Atomics count programs, and all sums are in a fixed order: the same shapes give
the same bits.

Numerics    scores, statistics, importances and partial results are fp32; probabilities, and pages of
            8 bits, enter products in the dtype of q; the result is rounded once
Bytes       a sequence of T tokens and a key-value head, (Dk + Dv) numbers each: T/d compressed rows, n l' selected and
            w window tokens; and, of fp32, rows * layers * T/l' importances, written and read
Reference   nsa_kernels.reference.decode
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_kernels.common.limits import check_dtypes, check_head_dim
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.decode.chosen import attend_chosen
from nsa_kernels.decode.first import attend_first
from nsa_kernels.decode.second import attend_second
from nsa_kernels.decode.tiles import CHUNK_BLOCKS, split, window_blocks
from nsa_kernels.decode_contracts import Appended, DecodeSizes, PagedCache, check_call, check_pages


def decode_takes(dtype: torch.dtype, dim_k: int, dim_v: int, slc_block_len: int) -> bool:
    """Whether the kernels take these: bf16, fp16 or fp32, the head dims of training's kernels, blocks of 16, 32, ..."""
    try:
        check_sizes(torch.empty(0, dtype=dtype), dim_k, dim_v, slc_block_len)
    except ValueError:
        return False
    return True


def check_sizes(q: Tensor, dim_k: int, dim_v: int, slc_block_len: int) -> None:
    """ValueError for what the kernels do not take."""
    check_dtypes(q=q)
    check_head_dim("Dk", dim_k, two=True)
    check_head_dim("Dv", dim_v, two=False)
    if slc_block_len < 16 or slc_block_len & (slc_block_len - 1):
        raise ValueError(
            f"slc_block_len={slc_block_len} must be a power of two from 16 on, because a page is one tile; choose such "
            f"a length, or decode with the operators of training"
        )


@torch.no_grad()
def decode_attention(
    q: Tensor, gates: Tensor, appended: Appended, cache: PagedCache, slots: Tensor,
    *, sizes: DecodeSizes, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gated sum of the three branches, and the chosen blocks; `cache.lengths` then counts the new tokens.

    q           [B, new, Hq, Dk]    new token i is at position `lengths[slot] + i`
    gates       [B, new, Hq, 3]     in the order cmp, slc, win
    slots       int32 [B]           as given to `decode_append`, which returned `appended`
    returns     out [B, new, Hq, Dv] in the dtype of q, 0 for an empty slot; block_indices int32 [B, new, Hkv, n], of
                each sequence from 0, ascending, -1 for none
    raises      ValueError on what does not fit together and on sizes that the kernels do not take
    """
    return _attend(q, gates, None, appended.ends, cache, slots, sizes, softmax_scale)


@torch.no_grad()
def decode_append_and_attend(
    q: Tensor, gates: Tensor, kv: Sequence[Tensor], cache: PagedCache, slots: Tensor,
    *, sizes: DecodeSizes, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`decode_append` and `decode_attention` in three launches, where no compressed block becomes whole.

    kv          k_cmp, v_cmp, k_slc, v_slc, k_win, v_win as `decode_append` takes them
    """
    check_dtypes(q=q, **{f"kv[{i}]": x for i, x in enumerate(kv)})
    given = [unit_stride(x).flatten(0, 1) for x in kv]
    return _attend(q, gates, given, torch.empty_like(slots), cache, slots, sizes, softmax_scale)


def _attend(
    q: Tensor, gates: Tensor, given: list[Tensor] | None, ends: Tensor, cache: PagedCache, slots: Tensor,
    sizes: DecodeSizes, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_call(q, gates, cache, slots, sizes)
    batch, new, _, dim_k = q.shape
    num_heads, dim_v = cache.v_slc.shape[2:]
    check_dtypes(q=q, k_win=cache.k_win)
    check_pages(cache)
    check_sizes(q, dim_k, dim_v, sizes.slc_block_len)
    q = unit_stride(q)
    cut = split(batch, num_heads, cache.page_table.shape[1], sizes.cells_slc)
    win_blocks = window_blocks(batch * new * num_heads, cdiv(sizes.window_len, sizes.slc_block_len))
    parts, window = attend_first(q, given, cache, slots, ends, cut, win_blocks, sizes, softmax_scale)
    chosen_pad = max(2, next_power_of_2(sizes.num_slc_blocks))
    chunk = max(CHUNK_BLOCKS, chosen_pad, cut.tile_pages)
    found = attend_second(parts, window, gates, cache, slots, cut, win_blocks, sizes, chunk, chosen_pad)
    return attend_chosen(q, found[0], chunk, *found[1:], gates, cache, slots, ends, sizes, softmax_scale)
