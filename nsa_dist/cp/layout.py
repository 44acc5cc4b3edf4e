"""What the kernels of one rank need to know of a plan: index tensors per query, per block and per halo row.

Kernels never see a layout's name. They get, for every local query, an interval of key rows (`cmp_begin .. cmp_end` in
the compressed keys of the whole sequence, `win_begin .. win_end` in the local rows with their halo) and its position
in the stream; for every own compressed block the row where it starts; and a table from global selection blocks to
pages.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.plan import ShardPlan


@dataclass(frozen=True)
class Halo:
    """Rows of the same document that stand left of each local segment, and how they get here.

    The extended buffer is `[halo of segment 0 | segment 0 | halo of segment 1 | segment 1]`, E rows.
    """

    num_rows: int  # E
    extended_rows: Tensor  # int64 [T]: extended row of each local row
    send_rows: Tensor  # int64 [sum(send_sizes)]: local rows to send, by destination rank
    recv_rows: Tensor  # int64 [sum(recv_sizes)]: extended rows to fill, by source rank
    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]


@dataclass(frozen=True)
class RankLayout:
    """Index tensors of one rank, on the device of its queries. T local tokens, M compressed blocks of the sequence.

    Compressed rows are those of the blocks, document by document; every document starts at a multiple of the kernels'
    key alignment, so that none shares a tile of keys with another. Rows between are zero and seen by no query.
    """

    position: Tensor  # int32 [T]: stream position, -1 for padding
    doc_start: Tensor  # int32 [T]: stream position of the document's first token
    cmp_begin: Tensor  # int32 [T]: compressed rows this query sees, [begin, end)
    cmp_end: Tensor
    win_begin: Tensor  # int32 [T]: extended rows in this query's window, [begin, end)
    win_end: Tensor
    cmp_rows: Tensor  # int32 [own blocks]: extended row (cmp_halo) where each own compressed block starts
    cmp_block_start: Tensor  # int64 [own blocks]: position in its document of each own block's first token
    num_cmp_max: int  # own blocks of the rank that has most
    cmp_gather_rows: Tensor  # int64 [M]: row of each compressed block in the gathered [P * num_cmp_max]
    num_cmp_rows: int  # compressed rows of the sequence: M, or more where documents are aligned
    cmp_place: Tensor | None  # int64 [M]: compressed row of each block; None: block i is row i
    local_blocks: Tensor  # int64 [T // l']: global id of each local selection block
    block_owner: Tensor  # int64 [num_blocks], on the CPU: rank that holds each selection block
    page_of_block: Tensor  # int64 [num_blocks], on the CPU: local page of each selection block, -1 if held elsewhere
    own_pages: Tensor  # the same, int32, on the device
    win_interior: slice  # queries whose windows lie in local rows, at most about half: they need no halo
    cmp_halo: Halo
    win_halo: Halo


def rank_layout(plan: ShardPlan, cfg: NSAConfig, rank: int, device: torch.device, key_alignment: int = 1) -> RankLayout:
    """The layout of `rank`, computed once per plan, config and device.

    key_alignment       multiple at which the compressed rows of each document start

    Raises ValueError if the plan's blocks are not the config's.
    """
    if plan.block_len != cfg.slc_block_len:
        raise ValueError(
            f"the plan has block_len={plan.block_len} but the config slc_block_len={cfg.slc_block_len}: a selection "
            f"block would straddle two ranks; build the plan with block_len={cfg.slc_block_len}"
        )
    key = ("layout", cfg, rank, device, key_alignment)
    return plan.memo(key, lambda: _compute(plan, cfg, rank, device, key_alignment))


def _compute(plan: ShardPlan, cfg: NSAConfig, rank: int, device: torch.device, key_alignment: int) -> RankLayout:
    stream = plan.stream_positions(rank)
    document, offset = plan.locate(stream)
    padding = document < 0

    # One left halo for the straddling compressed blocks (l - d rows: starts are multiples of d) and one for the
    # window, which is whole blocks so that an extended row and its stream position agree modulo the block length.
    cmp_halo = _halo(plan, rank, cfg.cmp_block_len - cfg.cmp_stride)
    win_halo = _halo(plan, rank, -(-(cfg.window_len - 1) // plan.block_len) * plan.block_len)

    counts = torch.tensor([cfg.num_cmp_blocks(length) for length in torch.tensor(plan.cu_seqlens).diff().tolist()])
    first_cmp = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])  # [num_docs + 1]
    first_row = first_cmp
    if key_alignment > 1 and plan.num_documents > 1:
        rows = (counts + key_alignment - 1) // key_alignment * key_alignment
        first_row = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
    seen = torch.div(offset + 1 - cfg.cmp_block_len, cfg.cmp_stride, rounding_mode="floor") + 1
    cmp_begin = first_row[document.clamp(min=0)].masked_fill(padding, 0)
    cmp_end = cmp_begin + seen.clamp(min=0).masked_fill(padding, 0)
    cmp_end = cmp_end.cummax(0).values  # padding rows see nothing, and keep begin and end from decreasing
    cmp_begin = torch.where(padding, cmp_end, cmp_begin)

    row = win_halo.extended_rows
    win_begin = torch.where(padding, row, row - offset.clamp(max=cfg.window_len - 1))
    win_end = torch.where(padding, row, row + 1)

    blocks = _compressed_blocks(plan, cfg, counts, first_cmp)
    own = blocks.owner == rank
    num_cmp_max = int(torch.bincount(blocks.owner, minlength=plan.cp_size).max())
    last_row = cmp_halo.extended_rows[blocks.last_local_row[own]]
    local_blocks = stream[:: plan.block_len] // plan.block_len
    first_block = torch.arange(plan.num_blocks) * plan.block_len
    page_of_block = torch.full((plan.num_blocks,), -1).index_copy_(0, local_blocks, torch.arange(len(local_blocks)))

    def ints(x: Tensor) -> Tensor:
        return x.to(torch.int32).to(device)

    return RankLayout(
        position=ints(stream.masked_fill(padding, -1)),
        doc_start=ints(torch.tensor(plan.stream_starts)[document.clamp(min=0)]),
        cmp_begin=ints(cmp_begin),
        cmp_end=ints(cmp_end),
        win_begin=ints(win_begin),
        win_end=ints(win_end),
        cmp_rows=ints(last_row - (cfg.cmp_block_len - 1)),
        cmp_block_start=blocks.doc_offset[own].to(device),
        num_cmp_max=num_cmp_max,
        cmp_gather_rows=_gather_rows(blocks.owner, plan.cp_size, num_cmp_max).to(device),
        num_cmp_rows=int(first_row[-1]),
        cmp_place=None if first_row is first_cmp else _runs(first_row[:-1], counts).to(device),
        local_blocks=local_blocks.to(device),
        block_owner=plan.owner(first_block)[0],
        page_of_block=page_of_block,
        own_pages=ints(page_of_block),
        win_interior=_interior(win_halo, win_begin, plan.block_len),
        cmp_halo=_halo_to(cmp_halo, device),
        win_halo=_halo_to(win_halo, device),
    )


@dataclass(frozen=True)
class _CompressedBlocks:
    """All compressed blocks of the sequence, document by document: [M]. A block belongs to its last token's rank."""

    owner: Tensor
    last_local_row: Tensor  # on the owner
    doc_offset: Tensor  # position of the first token in its document


def _compressed_blocks(plan: ShardPlan, cfg: NSAConfig, counts: Tensor, first: Tensor) -> _CompressedBlocks:
    document = torch.arange(plan.num_documents).repeat_interleave(counts)
    doc_offset = (torch.arange(int(first[-1])) - first[document]) * cfg.cmp_stride
    last = torch.tensor(plan.stream_starts)[document] + doc_offset + cfg.cmp_block_len - 1
    owner, last_local_row = plan.owner(last)
    return _CompressedBlocks(owner, last_local_row, doc_offset)


def _gather_rows(owner: Tensor, cp_size: int, num_cmp_max: int) -> Tensor:
    rows = torch.empty_like(owner)
    for rank in range(cp_size):
        own = (owner == rank).nonzero().squeeze(1)
        rows[own] = rank * num_cmp_max + torch.arange(len(own))
    return rows


def _halo(plan: ShardPlan, rank: int, halo_len: int) -> Halo:
    starts, reach = _reach(plan, rank, halo_len)
    lengths = torch.tensor([segment.length for segment in plan.segments(rank)])
    # Row of each segment's first halo row in the extended buffer, and of its first own row.
    halo_at = torch.cat([torch.zeros(1, dtype=torch.int64), (reach + lengths).cumsum(0)])
    source, _ = plan.owner(_runs(starts - reach, reach))
    order = source.argsort(stable=True)  # by source; ascending within one, as the source sends them

    send_rows = []
    for destination in range(plan.cp_size):
        first, count = _reach(plan, destination, halo_len)
        owner, row = plan.owner(_runs(first - count, count))
        send_rows.append(row[owner == rank])
    return Halo(
        num_rows=int(halo_at[-1]),
        extended_rows=_runs(halo_at[:-1] + reach, lengths),
        send_rows=torch.cat(send_rows),
        recv_rows=_runs(halo_at[:-1], reach)[order],
        send_sizes=tuple(map(len, send_rows)),
        recv_sizes=tuple(torch.bincount(source, minlength=plan.cp_size).tolist()),
    )


def _reach(plan: ShardPlan, rank: int, halo_len: int) -> tuple[Tensor, Tensor]:
    """Start of each segment, and how many rows left of it, at most `halo_len`, are in its first token's document."""
    starts = torch.tensor([segment.start for segment in plan.segments(rank)])
    document, offset = plan.locate(starts)
    return starts, offset.clamp(max=halo_len).masked_fill(document < 0, 0)


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """The concatenation of `arange(start, start + length)`.

    >>> _runs(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = lengths.cumsum(0) - lengths
    return (starts - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _interior(halo: Halo, begin: Tensor, block_len: int) -> slice:
    """Of the longest run of queries whose windows, extended rows from `begin` on, hold no halo row: at most T / 2.

    The other half is left for after the halo, to be computed under the compressed all-gather.
    """
    is_halo = torch.ones(halo.num_rows, dtype=torch.int64).index_fill_(0, halo.extended_rows, 0)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), is_halo.cumsum(0)])  # halo rows left of each row
    inside = before[halo.extended_rows] == before[begin]
    edges = torch.nn.functional.pad(inside.int(), (1, 1)).diff().nonzero().squeeze(1)
    starts, stops = edges[::2], edges[1::2]
    starts = (starts + block_len - 1) // block_len * block_len
    stops = torch.minimum(stops // block_len * block_len, starts + len(inside) // 2 // block_len * block_len)
    if len(starts) == 0 or int((stops - starts).max()) <= 0:
        return slice(0, 0)
    longest = int((stops - starts).argmax())
    return slice(int(starts[longest]), int(stops[longest]))


def _halo_to(halo: Halo, device: torch.device) -> Halo:
    return replace(
        halo,
        extended_rows=halo.extended_rows.to(device),
        send_rows=halo.send_rows.to(device),
        recv_rows=halo.recv_rows.to(device),
    )
