"""Who holds which token: plain data, no process group, no device.

The *stream* is the packed sequence in which every document's tail is padded to whole selection blocks and the end to
whole chunks, so that no selection block straddles two ranks. Padding is added by `shard` and removed by `unshard`.

    tokens      d0 d0 d0 | d1 d1 d1 d1 d1            two documents of 3 and 5 tokens, block_len 4
    stream      d0 d0 d0 . | d1 d1 d1 d1 | d1 . . .  3 blocks; + 1 block of padding when cp_size = 2, zigzag
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor

from nsa_dist.cp.device import on_host, put_on
from nsa_kernels.common.sizes import round_up

LAYOUTS = ("zigzag", "contiguous", "zigzag_documents", "contiguous_documents")


@dataclass(frozen=True)
class Segment:
    """A run of consecutive stream positions held by one rank: `[start, start + length)`, whole blocks."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class LocalBlocks:
    """Of each block of a rank, int64 [T // block_len]: no two documents share one."""

    start: Tensor  # stream position of its first token, a multiple of block_len
    document: Tensor  # the last one, if the block is padding behind it
    offset: Tensor  # of its first token in the document
    doc_len: Tensor  # of the document
    padding: Tensor  # bool [T // block_len, block_len]: behind the document's end


def _kept(compute: Callable[["ShardPlan"], Any]) -> Any:
    """A property that is computed once, outside of the caller's modes: see `cp.device.on_host`."""
    return property(lambda plan: plan.memo((compute.__name__,), lambda: compute(plan)))


@dataclass(frozen=True)
class ShardPlan:
    """The assignment of a packed sequence's tokens to context-parallel ranks. Build it with one of its class methods.

    zigzag              the stream in 2P chunks, rank r holds chunks r and 2P-1-r: Megatron's order for one document.
                        It balances causal work: early chunks see few keys, late ones many.
    contiguous          the stream in P chunks, rank r holds chunk r: for packs of short documents.
    zigzag_documents    every document is a zigzag of its own: Megatron's order for packs, and a batch of sequences in a
                        zigzag one behind the other. Documents are padded to 2P blocks.
    contiguous_documents    every document in P chunks of its own: such a batch of contiguous sequences. Documents are
                        padded to P blocks.

    Raises ValueError on a cu_seqlens that is not one, or sizes below 1.
    """

    cu_seqlens: tuple[int, ...]  # [num_docs + 1], of the whole packed sequence
    cp_size: int
    block_len: int
    layout: str
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple:  # a copy derives anew: launches that are kept belong to this process
        return type(self), (self.cu_seqlens, self.cp_size, self.block_len, self.layout)

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if len(cu) < 2 or cu[0] != 0 or cu[-1] < 1 or any(b < a for a, b in pairwise(cu)):
            raise ValueError(
                f"cu_seqlens={list(cu[:8])}{'...' if len(cu) > 8 else ''} must start at 0, never decrease and end at "
                f"the number of tokens, as it bounds the documents of a pack; for one document pass [0, num_tokens]"
            )
        sizes = (self.cp_size, self.block_len)
        if not all(type(size) is int and size >= 1 for size in sizes) or self.layout not in LAYOUTS:
            raise ValueError(
                f"cp_size={self.cp_size!r} and block_len={self.block_len!r} must be integers of at least 1 and layout="
                f"{self.layout!r} one of {LAYOUTS}; use the class method of that name"
            )

    @classmethod
    def zigzag(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        return _plan(as_bounds(cu_seqlens), cp_size, block_len, "zigzag")

    @classmethod
    def contiguous(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        return _plan(as_bounds(cu_seqlens), cp_size, block_len, "contiguous")

    @classmethod
    def zigzag_documents(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        return _plan(as_bounds(cu_seqlens), cp_size, block_len, "zigzag_documents")

    @classmethod
    def contiguous_documents(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        return _plan(as_bounds(cu_seqlens), cp_size, block_len, "contiguous_documents")

    @classmethod
    def auto(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        """`zigzag` where one document is at least 1.5 times a rank's share, so that its causal work needs balancing."""
        cu = as_bounds(cu_seqlens)
        longest = max((b - a for a, b in pairwise(cu)), default=0)
        return (cls.zigzag if longest * cp_size >= 1.5 * cu[-1] else cls.contiguous)(cu, cp_size, block_len)

    # --- sizes -----------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N, padding not counted."""
        return self.cu_seqlens[-1]

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def chunks_per_rank(self) -> int:
        """Of each region: a zigzag gives every rank an early and a late one."""
        return 1 if self.layout.startswith("contiguous") or self.cp_size == 1 else 2

    @property
    def deals_documents(self) -> bool:
        """Whether each document is dealt to the ranks by itself, rather than the stream as a whole."""
        return self.layout.endswith("_documents")

    @cached_property
    def stream_starts(self) -> tuple[int, ...]:
        """Where each document starts in the stream, and where the last one's padding ends: [num_docs + 1]."""
        unit = self.block_len
        if self.deals_documents:
            unit *= self.cp_size * self.chunks_per_rank
        padded = (round_up(b - a, unit) for a, b in pairwise(self.cu_seqlens))
        return tuple(accumulate(padded, initial=0))

    @cached_property
    def regions(self) -> tuple[int, ...]:
        """Bounds of the parts of the stream that are dealt to the ranks one by one: [num_regions + 1]."""
        if self.deals_documents:
            return self.stream_starts
        return (0, round_up(self.stream_starts[-1], self.block_len * self.cp_size * self.chunks_per_rank))

    @property
    def tokens_per_rank(self) -> int:
        """T, padding counted: the same on every rank."""
        return self.regions[-1] // self.cp_size

    @property
    def num_blocks(self) -> int:
        """Selection blocks of the stream, padding blocks at its end included."""
        return self.regions[-1] // self.block_len

    # --- who holds what --------------------------------------------------------------------------------------

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The runs of the stream that `rank` holds, ascending; neighbouring chunks are one segment."""

        def compute() -> tuple[Segment, ...]:
            owner, start, length = self.all_segments
            own = owner == rank
            return tuple(map(Segment, start[own].tolist(), length[own].tolist()))

        self._check_rank(rank)
        return self.memo(("segments", rank), compute)

    @_kept
    def all_segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rank, start, length) of the segments of every rank, rank by rank, each int64 [num_segments]."""
        bounds, ranks = _on_host(self.regions), torch.arange(self.cp_size)
        num_chunks = self.cp_size * self.chunks_per_rank
        chunk = torch.stack([ranks, num_chunks - 1 - ranks], 1)[:, None, : self.chunks_per_rank]  # [P, 1, 1 or 2]
        length = (bounds.diff() // num_chunks)[:, None].expand(self.cp_size, -1, self.chunks_per_rank)
        start = (bounds[:-1, None] + chunk * length).flatten()
        owner, length = ranks.repeat_interleave(len(start) // self.cp_size), length.flatten()
        owner, start, length = (x[length > 0] for x in (owner, start, length))
        goes_on = (owner[1:] == owner[:-1]) & (start[1:] == start[:-1] + length[:-1])
        is_first = torch.cat([torch.ones(1, dtype=torch.bool), ~goes_on])
        total = torch.zeros(int(is_first.sum()), dtype=torch.int64).index_add_(0, is_first.cumsum(0) - 1, length)
        return owner[is_first], start[is_first], total

    def stream_positions(self, rank: int) -> Tensor:
        """Stream position of every local token, int64 [T], padding included."""
        return (self.local_blocks(rank).start[:, None] + torch.arange(self.block_len, device="cpu")).flatten()

    def local_blocks(self, rank: int) -> "LocalBlocks":
        """The blocks that `rank` holds, in the order of its rows: what is asked of tokens is worked out of them."""

        def compute() -> LocalBlocks:
            owner, start, length = self.all_segments
            own = owner == rank
            block = runs(start[own] // self.block_len, length[own] // self.block_len)
            document, doc_start, doc_len = (table[block] for table in self._documents_of_blocks)
            offset = block * self.block_len - doc_start
            padding = torch.arange(self.block_len) >= (doc_len - offset)[:, None]
            return LocalBlocks(block * self.block_len, document, offset, doc_len, padding)

        self._check_rank(rank)
        return self.memo(("blocks", rank), compute)

    def positions(self, rank: int) -> Tensor:
        """Index in the packed sequence of every local token, int64 [T]; -1 for padding."""

        def compute() -> Tensor:
            blocks = self.local_blocks(rank)
            start = _on_host(self.cu_seqlens)[blocks.document] + blocks.offset
            return (start[:, None] + torch.arange(self.block_len)).masked_fill_(blocks.padding, -1).flatten()

        return self.memo(("positions", rank), compute)

    def document_positions(self, rank: int) -> Tensor:
        """Position of every local token in its document, int64 [T]: what RoPE wants; 0 for padding."""

        def compute() -> Tensor:
            blocks = self.local_blocks(rank)
            offset = blocks.offset[:, None] + torch.arange(self.block_len)
            return offset.masked_fill_(blocks.padding, 0).flatten()

        return self.memo(("document", rank), compute)

    def padding(self, rank: int) -> Tensor:
        """bool [T], true where the local token is padding."""
        return self.local_blocks(rank).padding.flatten()

    def locate(self, stream_position: Tensor) -> tuple[Tensor, Tensor]:
        """(document, position in it) of stream positions; document -1 marks padding."""
        document, start, length = (table[stream_position // self.block_len] for table in self._documents_of_blocks)
        offset = stream_position - start
        return torch.where(offset < length, document, -1), offset

    def owner(self, stream_position: Tensor) -> tuple[Tensor, Tensor]:
        """(rank, local row) that holds each stream position."""
        block = stream_position // self.block_len
        rank, first_row = self._owners_of_blocks
        return rank[block], first_row[block] + stream_position - block * self.block_len

    def holder(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """(rank, local row) that holds each index in the packed sequence."""
        bounds = _on_host(self.cu_seqlens)
        document = torch.searchsorted(bounds, position, right=True) - 1
        return self.owner(_on_host(self.stream_starts)[document] + position - bounds[document])

    @_kept
    def _documents_of_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """(document, its start in the stream, its length) of each block: a document starts with a block of its own."""
        starts = _on_host(self.stream_starts)
        document = torch.arange(self.num_documents).repeat_interleave(starts.diff() // self.block_len)
        document = torch.nn.functional.pad(document, (0, self.num_blocks - len(document)), value=self.num_documents - 1)
        return document, starts[document], _on_host(self.cu_seqlens).diff()[document]

    @_kept
    def _owners_of_blocks(self) -> tuple[Tensor, Tensor]:
        """(rank, local row of its first token) of each block of the stream, int64 [num_blocks]."""
        owner, start, length = self.all_segments
        count = length // self.block_len
        block = runs(start // self.block_len, count)
        row = torch.arange(len(block)) * self.block_len % self.tokens_per_rank
        rank = torch.empty_like(block).index_copy_(0, block, owner.repeat_interleave(count))
        return rank, torch.empty_like(block).index_copy_(0, block, row)

    @property
    def block_ids(self) -> Tensor | None:
        """For each selection block of the stream its id in the stream of `zigzag` and `contiguous`, int64 [num_blocks].

        Those are the ids callers see: they do not depend on the number of ranks. None where they are the same;
        -1 for blocks of padding alone.
        """
        if not self.deals_documents or self.cp_size == 1:
            return None

        def compute() -> Tensor:
            document, offset = self.locate(torch.arange(self.num_blocks) * self.block_len)
            plain = ShardPlan.contiguous(self.cu_seqlens, 1, self.block_len)
            first = _on_host(plain.stream_starts)[document.clamp(min=0)]
            return torch.where(document >= 0, torch.div(first + offset, self.block_len, rounding_mode="floor"), -1)

        return self.memo(("block_ids",), compute)

    # --- moving tokens ---------------------------------------------------------------------------------------

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """The tokens of `rank`: x [N, ...] in packed order -> [T, ...], padding rows zero. Differentiable."""
        if x.shape[0] != self.num_tokens:
            raise ValueError(
                f"x has {x.shape[0]} rows, but this plan shards {self.num_tokens} tokens (cu_seqlens[-1]); build "
                f"the plan from the cu_seqlens of this x"
            )
        self._check_rank(rank)
        if self.is_identity:
            return x
        rows = self._on(x.device, ("positions", rank), lambda: self.positions(rank))
        if not self._has_padding(rank):
            return x.index_select(0, rows)
        return self.blank_padding(x.index_select(0, rows.clamp(min=0)), rank)

    def blank_padding(self, x: Tensor, rank: int) -> Tensor:
        """A shard x [T, ...] whose padding rows are zero, as are their gradients; x itself if `rank` has none."""
        if not self._has_padding(rank):
            return x
        padding = self._on(x.device, ("padding", rank), lambda: self.padding(rank))
        return x.masked_fill(padding.reshape(-1, *[1] * (x.dim() - 1)), 0)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The inverse of `shard`: every rank's [T, ...] in rank order -> [N, ...] in packed order."""
        if len(shards) != self.cp_size or any(s.shape[0] != self.tokens_per_rank for s in shards):
            raise ValueError(
                f"unshard needs {self.cp_size} shards of {self.tokens_per_rank} rows, one a rank, but was given rows "
                f"{[s.shape[0] for s in shards]}; pass what `shard` returned for rank 0, 1, ..."
            )
        if self.is_identity:
            return shards[0]
        return torch.cat(list(shards)).index_select(0, self._on(shards[0].device, ("inverse",), self._inverse))

    @property
    def is_identity(self) -> bool:
        """One rank and no padding: sharding changes nothing."""
        return self.cp_size == 1 and self.tokens_per_rank == self.num_tokens

    def _inverse(self) -> Tensor:
        """For each packed token its row in the concatenated shards, int64 [N]."""
        position = torch.cat([self.positions(rank) for rank in range(self.cp_size)])
        rows = (position >= 0).nonzero().squeeze(1)
        return torch.empty(self.num_tokens, dtype=torch.int64).index_copy_(0, position[rows], rows)

    def _has_padding(self, rank: int) -> bool:
        return self.memo(("has_padding", rank), lambda: bool(self.local_blocks(rank).padding.any()))

    def prepare(self, rank: int, device: torch.device) -> None:
        """Work out now what `shard`, `unshard` and `blank_padding` of tensors on `device` will ask for."""
        if self._has_padding(rank):
            self._on(device, ("padding", rank), lambda: self.padding(rank))
        if self.cp_size == 1 and not self.is_identity:
            self._on(device, ("positions", rank), lambda: self.positions(rank))
            self._on(device, ("inverse",), self._inverse)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank={rank} is not one of this plan's ranks 0..{self.cp_size - 1} (cp_size)")

    def memo(self, key: tuple, compute):
        """`compute()`, once per plan and key: what is derived from a plan lives and dies with it."""
        if key not in self._cache:
            with on_host():
                self._cache[key] = compute()
        return self._cache[key]

    def _on(self, device: torch.device, key: tuple, compute: Callable[[], Tensor]) -> Tensor:
        return self.memo((*key, device), lambda: put_on(device, self.memo((*key, "host"), compute)))


def _plan(cu_seqlens: tuple[int, ...], cp_size: int, block_len: int, layout: str) -> ShardPlan:
    return (_plan_alone if cp_size == 1 else ShardPlan)(cu_seqlens, cp_size, block_len, layout)


@lru_cache(maxsize=4)
def _plan_alone(cu_seqlens: tuple[int, ...], cp_size: int, block_len: int, layout: str) -> ShardPlan:
    """The plan of one rank; calls with the same documents share it and what was derived from it.

    For `nsa_attention` makes one in every call that is not given any, and its index tensors take milliseconds. Not for
    groups: whether their ranks agree is asked once per plan, of all ranks at the same time.
    """
    return ShardPlan(cu_seqlens, cp_size, block_len, layout)


def runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """The concatenation of `arange(start, start + length)`.

    >>> runs(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = lengths.cumsum(0) - lengths
    return (starts - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _on_host(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def as_bounds(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    """`cu_seqlens` as integers. ValueError if it is not one row of them."""
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return tuple(index(value) for value in values)
    except TypeError:
        tensor = cu_seqlens if isinstance(cu_seqlens, Tensor) else None
        given = repr(cu_seqlens) if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(
            f"cu_seqlens={given} must be integers in one row, [num_docs + 1], because they count tokens and are never "
            f"rounded; pass for example torch.tensor([0, 5000, 8192], dtype=torch.int32), or cu_seqlens[0] of a batch"
        ) from None
