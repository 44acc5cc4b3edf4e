"""Attention of one to eight new tokens a sequence to a cache that lies in parts: the public face.

    decode_append       (nsa_kernels.decode) what is new: rings of every part, and the page that it belongs to
    part_store          what phi made of blocks that have become whole
    PartAttention       one step on a part with the compressed rows of its own pages; between its calls the parts
                        exchange what they found:

        step = PartAttention(q, gates, appended, part, slots, ...)
        lse -------- all parts' --> step.candidates(lses)
        candidates - all parts' --> step.attend(candidates)
        partials --- all parts' --> step.combine(partials)          out and block_indices, the same for every part

    TokenPartAttention  one step on a part that has all compressed rows: step.partials, all parts' -->
                        step.combine(partials). Before it `all_cells` and decoding's phi in place of `part_store`

As in `nsa_kernels.decode` grids follow from shapes alone and lengths are read on the device, so a CUDA graph of it
stays valid; sums have a fixed order. What is exchanged does not grow with the context.

Numerics    scores, statistics, importances and partial results are fp32; the result is rounded once
Reference   nsa_kernels.reference.decode, of the whole cache
"""

import torch
from torch import Tensor

from nsa_kernels.common.limits import check_dtypes
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.common.sizes import cdiv, next_power_of_2
from nsa_kernels.decode.attention import check_sizes, decode_takes
from nsa_kernels.decode.first import attend_first
from nsa_kernels.decode.second import attend_second
from nsa_kernels.decode.tiles import CHUNK_BLOCKS, split, window_blocks
from nsa_kernels.decode_contracts import Appended, DecodeSizes, check_call, check_pages
from nsa_kernels.decode_part.candidates import candidates_of_part
from nsa_kernels.decode_part.chosen import attend_chosen_here
from nsa_kernels.decode_part.compressed import score_part
from nsa_kernels.decode_part.merge import Merged, combine_parts, merge_chosen, merge_chosen_only, merge_compressed
from nsa_kernels.decode_part.part import CachePart, TokenPart, cells_following


def part_takes(dtype: torch.dtype, dim_k: int, dim_v: int, sizes: DecodeSizes) -> bool:
    """Whether the kernels take these: what `decode_takes` does, and compressed blocks that reach into one page more at
    most, l <= l' + d."""
    fits = cells_following(sizes) <= sizes.cells_slc
    return fits and decode_takes(dtype, dim_k, dim_v, sizes.slc_block_len)


class PartAttention:
    """One step on one part, q [B, new, Hq, Dk] and the rest as `decode_attention` takes them.

    Raises ValueError on what does not fit together and on sizes that the kernels do not take.
    """

    @torch.no_grad()
    def __init__(
        self, q: Tensor, gates: Tensor, appended: Appended, part: CachePart, slots: Tensor,
        *, sizes: DecodeSizes, softmax_scale: float,
    ) -> None:  # fmt: skip
        cache = part.cache
        check_call(q, gates, cache, slots, sizes)
        check_dtypes(q=q, k_pages=cache.k_slc)
        num_heads, dim_v = cache.v_slc.shape[2:]
        check_sizes(q, q.shape[3], dim_v, sizes.slc_block_len)
        self.q, self.gates, self.part, self.slots = unit_stride(q), gates, part, slots
        self.ends, self.sizes, self.softmax_scale = appended.ends, sizes, softmax_scale
        self.cut = split(len(q), num_heads, part.max_pages, sizes.cells_slc)
        self._scores = score_part(self.q, part, slots, self.ends, self.cut, sizes, softmax_scale)
        self._merged = Merged(q, q.shape[:3].numel(), dim_v, sends=2)
        merge_compressed(self._scores, self._merged, *q.shape[1:3])

    @property
    def lse(self) -> Tensor:
        """fp32 [B * new * Hq], of the compressed branch on this part, in powers of 2."""
        return self._merged.lse_cmp

    @torch.no_grad()
    def candidates(self, lses: Tensor) -> Tensor:
        """lses [parts, B * new * Hq] -> int64 [B, new, Hkv, n_pad]: the best blocks here, with their importance."""
        least = max(CHUNK_BLOCKS, next_power_of_2(self.sizes.num_slc_blocks), 2, self.cut.tile_pages)
        return candidates_of_part(
            self._scores, lses, self.part, self.slots, self.ends, self.q.shape[1], self.cut, self.sizes, least
        )

    @torch.no_grad()
    def attend(self, candidates: Tensor) -> Tensor:
        """candidates [parts, B, new, Hkv, n_pad] -> fp32 [2 * B * new * Hq * (Dv + 1)]: two branches, partial."""
        self._chosen = attend_chosen_here(
            self.q, candidates, self.part.cache, self.slots, self.ends, self.sizes, self.softmax_scale
        )
        merge_chosen(self._chosen, self._merged)
        return self._merged.sent

    @torch.no_grad()
    def combine(self, partials: Tensor) -> tuple[Tensor, Tensor]:
        """partials [parts, ...] -> out [B, new, Hq, Dv], 0 for an empty slot, and block_indices int32
        [B, new, Hkv, n]; the lengths in the cache then count the new tokens."""
        out = self.q.new_empty(*self.q.shape[:3], self._merged.dim_v)
        window = self._merged.all[self._merged.win_at :]
        combine_parts(partials, window, self.gates, self.part.cache, self.slots, self.ends, out, sends=2)
        return out, self._chosen.block_indices


class TokenPartAttention:
    """One step on one part that has all compressed rows; arguments as of `PartAttention`.

    The compressed branch, the window and the choice are launches of `nsa_kernels.decode`, the same on every part and of
    the bits of a cache in one piece. Pages may be of 8 bits.
    """

    @torch.no_grad()
    def __init__(
        self, q: Tensor, gates: Tensor, appended: Appended, part: TokenPart, slots: Tensor,
        *, sizes: DecodeSizes, softmax_scale: float,
    ) -> None:  # fmt: skip
        cache = part.whole
        check_call(q, gates, cache, slots, sizes)
        check_dtypes(q=q, k_win=cache.k_win)
        check_pages(cache)
        batch, new, _, dim_k = q.shape
        num_heads, dim_v = cache.v_slc.shape[2:]
        check_sizes(q, dim_k, dim_v, sizes.slc_block_len)
        self.q, self.gates, self.cache, self.slots = unit_stride(q), gates, part.cache, slots
        self.ends = appended.ends
        cut = split(batch, num_heads, cache.page_table.shape[1], sizes.cells_slc)
        win_blocks = window_blocks(batch * new * num_heads, cdiv(sizes.window_len, sizes.slc_block_len))
        found = attend_first(self.q, None, cache, slots, self.ends, cut, win_blocks, sizes, softmax_scale)
        chosen_pad = max(2, next_power_of_2(sizes.num_slc_blocks))
        chunk = max(CHUNK_BLOCKS, chosen_pad, cut.tile_pages)
        candidates, self._sum_of_two, _ = attend_second(
            *found, gates, self.ends, cut, win_blocks, sizes, chunk, chosen_pad, cache.v_scale
        )
        self._chosen = attend_chosen_here(self.q, candidates, part.cache, slots, self.ends, sizes, softmax_scale, chunk)
        self._merged = Merged(q, q.shape[:3].numel(), dim_v, sends=1)
        merge_chosen_only(self._chosen, self._merged)

    @property
    def partials(self) -> Tensor:
        """fp32 [B * new * Hq * (Dv + 1)]: the selected branch on this part's tokens."""
        return self._merged.sent

    @torch.no_grad()
    def combine(self, partials: Tensor) -> tuple[Tensor, Tensor]:
        """partials [parts, ...] -> as `PartAttention.combine`."""
        out = self.q.new_empty(*self.q.shape[:3], self._merged.dim_v)
        combine_parts(partials, self._sum_of_two, self.gates, self.cache, self.slots, self.ends, out, sends=1)
        return out, self._chosen.block_indices
