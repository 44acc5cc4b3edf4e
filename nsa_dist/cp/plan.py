"""Who holds which token: plain data, no process group, no device.

The *stream* is the packed sequence in which every document's tail is padded to whole selection blocks and the end to
whole chunks, so that no selection block straddles two ranks. Padding is added by `shard` and removed by `unshard`.

    tokens      d0 d0 d0 | d1 d1 d1 d1 d1            two documents of 3 and 5 tokens, block_len 4
    stream      d0 d0 d0 . | d1 d1 d1 d1 | d1 . . .  3 blocks; + 1 block of padding when cp_size = 2, zigzag
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Segment:
    """A run of consecutive stream positions held by one rank: `[start, start + length)`, whole blocks."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class ShardPlan:
    """The assignment of a packed sequence's tokens to context-parallel ranks. Build it with `zigzag` or `contiguous`.

    zigzag      the stream in 2P chunks, rank r holds chunks r and 2P-1-r: Megatron's order for one document. It
                balances causal work: early chunks see few keys, late ones many.
    contiguous  the stream in P chunks, rank r holds chunk r: for packs of short documents.

    Raises ValueError on a cu_seqlens that is not one, or sizes below 1.
    """

    cu_seqlens: tuple[int, ...]  # [num_docs + 1], of the whole packed sequence
    cp_size: int
    block_len: int
    layout: str
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if len(cu) < 2 or cu[0] != 0 or cu[-1] < 1 or any(b < a for a, b in pairwise(cu)):
            raise ValueError(
                f"cu_seqlens={list(cu[:8])}{'...' if len(cu) > 8 else ''} must start at 0, never decrease and end at "
                f"the number of tokens, as it bounds the documents of a pack; for one document pass [0, num_tokens]"
            )
        if self.cp_size < 1 or self.block_len < 1 or self.layout not in LAYOUTS:
            raise ValueError(
                f"cp_size={self.cp_size} and block_len={self.block_len} must be at least 1 and layout="
                f"{self.layout!r} one of {LAYOUTS}; use ShardPlan.zigzag or ShardPlan.contiguous"
            )

    @classmethod
    def zigzag(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        return cls(_as_tuple(cu_seqlens), cp_size, block_len, "zigzag")

    @classmethod
    def contiguous(cls, cu_seqlens: Tensor | Sequence[int], cp_size: int, block_len: int = 64) -> "ShardPlan":
        return cls(_as_tuple(cu_seqlens), cp_size, block_len, "contiguous")

    # --- sizes -----------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N, padding not counted."""
        return self.cu_seqlens[-1]

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def stream_starts(self) -> tuple[int, ...]:
        """Where each document starts in the stream, and where the last one's padding ends: [num_docs + 1]."""
        starts = [0]
        for a, b in pairwise(self.cu_seqlens):
            starts.append(starts[-1] + -(-(b - a) // self.block_len) * self.block_len)
        return tuple(starts)

    @property
    def chunks_per_rank(self) -> int:
        return 2 if self.layout == "zigzag" and self.cp_size > 1 else 1

    @cached_property
    def chunk_len(self) -> int:
        num_chunks = self.cp_size * self.chunks_per_rank
        num_blocks = self.stream_starts[-1] // self.block_len
        return -(-num_blocks // num_chunks) * self.block_len

    @property
    def tokens_per_rank(self) -> int:
        """T, padding counted: the same on every rank."""
        return self.chunk_len * self.chunks_per_rank

    @property
    def num_blocks(self) -> int:
        """Selection blocks of the stream, padding blocks at its end included."""
        return self.tokens_per_rank * self.cp_size // self.block_len

    # --- who holds what --------------------------------------------------------------------------------------

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The runs of the stream that `rank` holds, ascending; neighbouring chunks are one segment."""
        self._check_rank(rank)
        size, length = self.cp_size, self.chunk_len
        if self.chunks_per_rank == 1:
            return (Segment(rank * length, length),)
        if rank == size - 1:  # its two chunks touch in the middle of the stream
            return (Segment(rank * length, 2 * length),)
        return (Segment(rank * length, length), Segment((2 * size - 1 - rank) * length, length))

    def stream_positions(self, rank: int) -> Tensor:
        """Stream position of every local token, int64 [T], padding included."""
        return self.memo(
            ("stream", rank), lambda: torch.cat([torch.arange(s.start, s.stop) for s in self.segments(rank)])
        )

    def positions(self, rank: int) -> Tensor:
        """Index in the packed sequence of every local token, int64 [T]; -1 for padding."""

        def compute() -> Tensor:
            document, offset = self.locate(self.stream_positions(rank))
            start = torch.tensor(self.cu_seqlens)[document.clamp(min=0)]
            return torch.where(document >= 0, start + offset, -1)

        return self.memo(("positions", rank), compute)

    def document_positions(self, rank: int) -> Tensor:
        """Position of every local token in its document, int64 [T]: what RoPE wants; 0 for padding."""
        return self.memo(
            ("document", rank), lambda: self.locate(self.stream_positions(rank))[1].masked_fill_(self.padding(rank), 0)
        )

    def padding(self, rank: int) -> Tensor:
        """bool [T], true where the local token is padding."""
        return self.positions(rank) < 0

    def locate(self, stream_position: Tensor) -> tuple[Tensor, Tensor]:
        """(document, position in it) of stream positions; document -1 marks padding."""
        starts = torch.tensor(self.stream_starts)
        lengths = torch.tensor(self.cu_seqlens).diff()
        document = torch.searchsorted(starts, stream_position, right=True) - 1
        document = document.clamp(max=self.num_documents - 1)
        offset = stream_position - starts[document]
        return torch.where(offset < lengths[document], document, -1), offset

    def owner(self, stream_position: Tensor) -> tuple[Tensor, Tensor]:
        """(rank, local row) that holds each stream position."""
        chunk = torch.div(stream_position, self.chunk_len, rounding_mode="floor")
        within = stream_position - chunk * self.chunk_len
        if self.chunks_per_rank == 1:
            return chunk, within
        mirrored = 2 * self.cp_size - 1 - chunk
        return torch.minimum(chunk, mirrored), within + (chunk > mirrored) * self.chunk_len

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
        index = self._on(x.device, ("positions", rank), lambda: self.positions(rank))
        if not self._has_padding(rank):
            return x.index_select(0, index)
        local = x.index_select(0, index.clamp(min=0))
        return local.masked_fill((index < 0).reshape(-1, *[1] * (x.dim() - 1)), 0)

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
        return bool(self.memo(("has_padding", rank), lambda: self.padding(rank).any()))

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank={rank} is not one of this plan's ranks 0..{self.cp_size - 1} (cp_size)")

    def memo(self, key: tuple, compute):
        """`compute()`, once per plan and key: what is derived from a plan lives and dies with it."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def _on(self, device: torch.device, key: tuple, compute) -> Tensor:
        return self.memo((*key, device), lambda: compute().to(device))


def _as_tuple(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    return tuple(int(v) for v in values)
