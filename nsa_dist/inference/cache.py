"""The cache of one layer: many sequences of different lengths in one pool of pages."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nsa_dist.compress import Compress, PhiForm
from nsa_dist.config import NSAConfig
from nsa_dist.inference.pool import CmpPlacement, PagePool, placement_of
from nsa_dist.inference.storage import MOST_BACK, CacheShape, PageFormat, Storage
from nsa_dist.inference.tables import Tables
from nsa_dist.rope import turn_of


@dataclass
class SequenceState:
    """Of one sequence."""

    ring: int
    home: int = 0  # over P ranks its page i is on rank (home + i) % P; forks have their parent's
    length: int = 0
    longest: int = 0  # so long it has been: of what lies MOST_BACK tokens before that, rings may hold no more
    pages: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # int64, on the CPU
    is_stale: bool = False  # behind its last token the page, shared at the time, holds what was taken back
    told_pages: int = 0  # so many of its pages, and this length, the tables on the device say
    told_length: int = -1


class NSACache:
    """Keys and values of one layer for inference; a model holds one a layer.

    cfg                         sizes of the branches; a page is one selection block, l' tokens
    num_kv_heads, head_dim_k, head_dim_v
    num_pages                   of all sequences together: their tokens, each sequence rounded up to whole pages; of a
                                cache over P ranks those of each, about a P-th of that
    dtype, device               of keys and values, as `nsa_prefill` and `nsa_decode` will be given them
    compress_k, compress_v      phi, as `nsa_attention` takes it
    max_sequences               rings to make at once; more are added when there are more sequences
    max_tokens                  of one sequence: tables on the device are made for so many at once, and anew for longer
    page_dtype                  of the keys and values of the selected branch and of the compressed ones; None: `dtype`;
                                torch.float8_e4m3fn takes half of bf16's bytes, and rounds to 4 bits
    k_scale, v_scale            powers of two by which numbers of 8 bits are multiplied: up to 448 of them fit
    cmp_placement               over ranks: "replicated", compressed keys and values are on every rank; "sharded", each
                                on the rank of its page; None: replicated if the pages of all ranks have room for up to
                                1M tokens and 64k that follow. A cache that is not over ranks has them all, whatever it
                                is

    Kept are keys and values of the selected branch for all tokens, of the window branch for the last w + 8, of the
    compressed branch for the last l + 8, and one compressed key and value every d tokens: `num_bytes`.

    The first call of `nsa_prefill` or `nsa_decode` with a `cp_group` makes it one rank's part of a cache over ranks
    (`over_ranks`). Sequences are then made, forked, truncated and freed on every rank alike.

    Raises ValueError for sizes below one, unknown and freed ids; `CacheFullError`, a ValueError, for a full pool.
    """

    def __init__(
        self,
        cfg: NSAConfig,
        num_kv_heads: int,
        head_dim_k: int,
        head_dim_v: int,
        num_pages: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compress_k: Compress | None = None,
        compress_v: Compress | None = None,
        max_sequences: int = 0,
        max_tokens: int = 0,
        page_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        cmp_placement: CmpPlacement | None = None,
    ) -> None:
        sizes = {"num_kv_heads": num_kv_heads, "head_dim_k": head_dim_k, "head_dim_v": head_dim_v}
        for name, value in {**sizes, "num_pages": num_pages}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or the cache holds nothing; pass the model's")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(
                f"dtype={dtype} must be bf16, fp16, fp32 or fp64, because keys and values are kept as they are "
                f"multiplied; pass the dtype of q"
            )
        self.cfg, self.compress_k, self.compress_v = cfg, compress_k, compress_v
        self.shape = CacheShape(cfg, num_kv_heads, head_dim_k, head_dim_v)
        pages = _page_format(dtype, page_dtype, k_scale, v_scale)
        placement_of(cmp_placement, 0)  # a name that is none is refused here
        self.cmp_placement = cmp_placement
        self.storage = Storage(self.shape, num_pages, dtype, torch.device(device), pages)
        self.storage.reserve_rings(max_sequences)
        self.tables = Tables(self.storage.device, self._pages_of(max_tokens))
        self._pool = PagePool(num_pages)
        self._sequences: dict[int, SequenceState] = {}
        self._next_id = 0

    @cached_property
    def turns(self) -> list[Tensor | None]:
        """By what compressed keys and values are turned, for decoding kernels: `turn_of`, on the device."""
        forms = [PhiForm.of(phi, self.cfg.cmp_block_len) for phi in (self.compress_k, self.compress_v)]
        dims = self.shape.head_dim_k, self.shape.head_dim_v
        return [
            turn_of(form.rotary, dim, self.storage.device) if form and form.rotary else None
            for form, dim in zip(forms, dims, strict=True)
        ]

    @property
    def num_free_pages(self) -> int:
        """Over ranks, of the one that has fewest."""
        return self._pool.num_free

    def hold_over_ranks(self, storage: Storage, cp_size: int) -> None:
        """From now on `storage` holds what one of `cp_size` ranks does. ValueError if a sequence has tokens already."""
        used = [seq for seq, state in self._sequences.items() if state.length]
        if used:
            raise ValueError(
                f"cp_group was given, but sequences {used[:5]} lie here whole, as they were appended without one; free "
                f"them first, or make another NSACache and append over the {cp_size} ranks from the first token on"
            )
        self.storage, self._pool = storage, PagePool(self._pool.num_pages, cp_size)

    def num_bytes(self) -> int:
        """Of all its tensors, by `CacheShape.num_bytes`: pages, and rings of as many sequences as there ever were."""
        return self.storage.num_bytes

    def new_sequence(self) -> int:
        """The id of an empty sequence; ids are never used again."""
        return self._add(SequenceState(self.storage.take_ring(), self._next_id))

    def fork(self, seq: int) -> int:
        """The id of a sequence that begins as `seq` is now. Full pages are shared; a partial page and rings are copied.

        `CacheFullError` if the last page is partial and no page is free.
        """
        old = self.state(seq)
        full, partial = divmod(old.length, self.cfg.slc_block_len)
        self._pool.need([old.home + full] * (partial > 0), f"fork of sequence {seq}")
        new = SequenceState(self.storage.take_ring(), old.home, old.length, old.longest, old.pages.clone())
        self.storage.copy_ring(old.ring, new.ring)
        self._pool.share(old.pages[:full])
        if partial:
            self._copy_last_page(new)
        return self._add(new)

    def truncate(self, seq: int, length: int) -> None:
        """Keep the first `length` tokens: at most 8 are taken back, counted from the longest that `seq` has been.

        Compressed keys of blocks that are whole no longer go, too.
        """
        state = self.state(seq)
        least = max(0, state.longest - MOST_BACK)
        if not least <= length <= state.length:
            raise ValueError(
                f"sequence {seq} has {state.length} tokens and had {state.longest}, so it can be truncated to "
                f"{least} to {state.length} of them, not to {length}: rings hold the last tokens and {MOST_BACK} more; "
                f"fork it before what may have to be taken back further"
            )
        kept = self._pages_of(length)
        self._pool.drop(state.pages[kept:])
        state.pages, state.length = state.pages[:kept], length
        state.told_pages = min(state.told_pages, kept)
        self._blank_behind(state)

    def free(self, seq: int) -> None:
        """Give back its pages, which others that share them keep. The id is unknown from now on."""
        state = self.state(seq)
        del self._sequences[seq]
        self._pool.drop(state.pages)
        self.storage.drop_ring(state.ring)

    def length(self, seq: int) -> int:
        """Tokens of it that are in the cache."""
        return self.state(seq).length

    def state(self, seq: int) -> SequenceState:
        """ValueError for an id that is none."""
        if seq not in self._sequences:
            known = isinstance(seq, int) and 0 <= seq < self._next_id
            raise ValueError(
                f"sequence {seq!r} {'was freed' if known else 'is unknown'}: this cache holds {sorted(self._sequences)}"
                f"; pass an id that new_sequence or fork returned and that was not freed since"
            )
        return self._sequences[seq]

    @contextmanager
    def appending(self, seqs: Sequence[int], added: Sequence[int]) -> Iterator[list[SequenceState]]:
        """Inside, the sequences hold pages for `added` more tokens each, which they have once the block is left.

        If it is left by an exception they are as before. `CacheFullError` before anything is changed.
        """
        states = [self.state(seq) for seq in seqs]
        before = [state.pages for state in states]
        self._reserve(states, added)
        try:
            yield states
        except BaseException:
            for state, old in zip(states, before, strict=True):
                self._take_back(state, old)
            raise
        for state, count in zip(states, added, strict=True):
            state.length += count
            state.longest = max(state.longest, state.length)

    def _reserve(self, states: Sequence[SequenceState], added: Sequence[int]) -> None:
        wanted = [self._pages_of(state.length + count) for state, count in zip(states, added, strict=True)]
        more = [
            range(state.home + len(state.pages), state.home + total)
            for total, state in zip(wanted, states, strict=True)
        ]  # fmt: skip
        # The last page changes: one that others hold as well, as after a truncation, is copied first.
        copies = [state for state, count in zip(states, added, strict=True) if count and self._is_last_shared(state)]
        turns = [turn for some in more for turn in some] + [self._last_turn(state) for state in copies]
        self._pool.need(turns, f"{sum(added)} new tokens of {len(states)} sequences")
        for state in states:
            if state.is_stale:
                self._blank_behind(state)
        for state in copies:
            state.pages = state.pages.clone()
            old = state.pages[-1:].clone()
            self._copy_last_page(state)
            self._pool.drop(old)
        for state, some in zip(states, more, strict=True):
            if some:
                pages = self._pool.take(some)
                self.storage.blank_pages(pages)
                state.pages = torch.cat([state.pages, pages])

    def _take_back(self, state: SequenceState, before: Tensor) -> None:
        self.storage.blank_pages(state.pages[len(before) :])
        self._pool.drop(state.pages[len(before) :])
        state.pages = state.pages[: len(before)]  # a copied last page stays: it holds the same
        state.told_pages, state.told_length = min(state.told_pages, len(before)), -1
        self._blank_behind(state)

    def _copy_last_page(self, state: SequenceState) -> None:
        """Give it a page of its own for its last, partial one; the pool is asked before."""
        page = self._pool.take([self._last_turn(state)])
        self.storage.blank_pages(page)
        self.storage.copy_page(int(state.pages[-1]), int(page), *self._in_last_page(state))
        state.pages[-1], state.is_stale = page[0], False
        state.told_pages = min(state.told_pages, len(state.pages) - 1)

    def _blank_behind(self, state: SequenceState) -> None:
        """Zeros behind its last token; while others hold the page it is left, and copied before this one goes on."""
        tokens, num_cmp = self._in_last_page(state)
        state.is_stale = self._is_last_shared(state)
        if tokens and not state.is_stale:
            self.storage.blank_tail(int(state.pages[-1]), tokens, num_cmp)

    def _last_turn(self, state: SequenceState) -> int:
        return state.home + len(state.pages) - 1

    def _in_last_page(self, state: SequenceState) -> tuple[int, int]:
        """Tokens and compressed blocks in its last page, if that is a partial one; or 0, 0."""
        tokens = state.length % self.cfg.slc_block_len
        return tokens, tokens // self.cfg.cmp_stride

    def _is_last_shared(self, state: SequenceState) -> bool:
        partial = state.length % self.cfg.slc_block_len > 0
        return partial and self._pool.is_shared(int(state.pages[-1]))

    def _pages_of(self, length: int) -> int:
        return -(-length // self.cfg.slc_block_len)

    def _add(self, state: SequenceState) -> int:
        self._sequences[self._next_id] = state
        self._next_id += 1
        return self._next_id - 1


def _page_format(dtype: torch.dtype, page_dtype: torch.dtype | None, k_scale: float, v_scale: float) -> PageFormat:
    """ValueError for dtypes that pages cannot have and scales that would round."""
    found = PageFormat(page_dtype or dtype, k_scale, v_scale)
    if found.dtype != dtype and not found.is_fp8:
        raise ValueError(
            f"page_dtype={page_dtype} must be torch.float8_e4m3fn, or {dtype} as all of the cache, because kernels "
            f"widen 8 bits and no others; leave it out, or pass torch.float8_e4m3fn"
        )
    if any(not scale > 0 or math.frexp(scale)[0] != 0.5 for scale in (k_scale, v_scale)):
        raise ValueError(
            f"k_scale={k_scale} and v_scale={v_scale} must be positive powers of two, so that scaling itself rounds "
            f"nothing; pass the power of two above the largest key, or value, over 448"
        )
    if not found.is_fp8 and (k_scale, v_scale) != (1.0, 1.0):
        raise ValueError(
            f"k_scale={k_scale} and v_scale={v_scale} are for pages of 8 bits, and these are {found.dtype}, which are "
            f"kept as they are; leave them out, or pass page_dtype=torch.float8_e4m3fn"
        )
    return found
