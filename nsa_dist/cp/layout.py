"""What the kernels of one rank need to know of a plan: index tensors per query, per block and per halo row.

Kernels never see a layout's name. They get, for every local query, an interval of key rows (`cmp_begin .. cmp_end` in
the compressed keys of the whole sequence, `win_begin .. win_end` in the local rows with their halo) and its position
in the stream; for every own compressed block the row where it starts; and a table from global selection blocks to
pages.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.device import put_on
from nsa_dist.cp.plan import ShardPlan, runs
from nsa_kernels.common.sizes import round_up


class HaloPieces(NamedTuple):
    """What the halos of all ranks take of each block, int64 on the CPU: from whom, for whom, so many rows."""

    source: Tensor
    destination: Tensor
    size: Tensor


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
    most_sent: int  # rows of the rank that sends most
    most_received: int
    pieces: HaloPieces


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
    scored_end: Tensor  # int32 [T]: as cmp_end where importances decide; cmp_begin where all visible blocks are chosen
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
    own_pages: Tensor  # int32 [num_blocks]: local page of each selection block, -1 if held elsewhere
    win_interior: slice  # queries whose windows lie in local rows, at most about half: they need no halo
    cmp_halo: Halo
    win_halo: Halo
    host: "HostLayout" = field(compare=False, repr=False)
    kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what others make of it

    def on(self, device: torch.device) -> "RankLayout":
        """Of one on the CPU its copy on `device`, in the order of the current stream; nobody waits."""
        moved: dict[str, Any] = {
            name: put_on(device, x)
            for name, x in vars(self).items()
            if isinstance(x, Tensor) and name != "block_owner"  # the host reads it
        }
        moved |= {name: _halo_to(getattr(self, name), device) for name in ("cmp_halo", "win_halo")}
        return replace(self, **moved, kept={})


class HostLayout(NamedTuple):
    """What a layout was made of, on the CPU."""

    plan: ShardPlan
    rank: int
    cmp_owner: Tensor  # int64 [M]: rank of each compressed block
    cmp_gather_rows: Tensor
    cmp_place: Tensor | None
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
    if device.type == "cpu":
        return plan.memo(key, lambda: _compute(plan, cfg, rank, key_alignment))
    return plan.memo(key, lambda: rank_layout(plan, cfg, rank, torch.device("cpu"), key_alignment).on(device))


def _compute(plan: ShardPlan, cfg: NSAConfig, rank: int, key_alignment: int) -> RankLayout:
    # One left halo for the straddling compressed blocks (l - d rows: starts are multiples of d) and one for the
    # window, which is whole blocks so that an extended row and its stream position agree modulo the block length.
    cmp_halo, _ = _halo(plan, rank, cfg.cmp_block_len - cfg.cmp_stride)
    win_halo, reach = _halo(plan, rank, round_up(cfg.window_len - 1, plan.block_len))

    num_cmp = ((torch.tensor(plan.cu_seqlens).diff() - cfg.cmp_block_len) // cfg.cmp_stride + 1).clamp(min=0)
    first_cmp = torch.cat([torch.zeros(1, dtype=torch.int64), num_cmp.cumsum(0)])  # [num_docs + 1]
    first_row = first_cmp
    if key_alignment > 1 and plan.num_documents > 1:
        rows = (num_cmp + key_alignment - 1) // key_alignment * key_alignment
        first_row = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)])
    cmp_blocks = _compressed_blocks(plan, cfg, num_cmp, first_cmp)
    own = cmp_blocks.owner == rank
    place = None if first_row is first_cmp else runs(first_row[:-1], num_cmp)
    num_cmp_max = int(torch.bincount(cmp_blocks.owner, minlength=plan.cp_size).max())
    gather_rows = _gather_rows(cmp_blocks.owner, plan.cp_size, num_cmp_max)
    last_row = cmp_halo.extended_rows[cmp_blocks.last_local_row[own]]

    local_blocks = plan.local_blocks(rank).start // plan.block_len
    page_of_block = torch.full((plan.num_blocks,), -1).index_copy_(0, local_blocks, torch.arange(len(local_blocks)))
    queries = _queries(plan, cfg, rank, first_row, win_halo)
    win_begin = queries["win_begin"]
    of_queries: dict[str, Any] = {name: x.flatten() for name, x in queries.items()}
    return RankLayout(
        **of_queries,
        cmp_rows=(last_row - (cfg.cmp_block_len - 1)).to(torch.int32),
        cmp_block_start=cmp_blocks.doc_offset[own],
        num_cmp_max=num_cmp_max,
        cmp_gather_rows=gather_rows,
        num_cmp_rows=int(first_row[-1]),
        cmp_place=place,
        local_blocks=local_blocks,
        block_owner=plan.owner(torch.arange(plan.num_blocks) * plan.block_len)[0],
        own_pages=page_of_block.to(torch.int32),
        win_interior=_interior(win_begin >= reach[:, None], plan.block_len),
        cmp_halo=cmp_halo,
        win_halo=win_halo,
        host=HostLayout(plan, rank, cmp_blocks.owner, gather_rows, place, cmp_halo, win_halo),
    )


def _queries(plan: ShardPlan, cfg: NSAConfig, rank: int, first_cmp: Tensor, win_halo: Halo) -> dict[str, Tensor]:
    """What `RankLayout` says of each query, int32 [T // l', l'].

    One number a block, and what its tokens differ by: there are many tokens, and the numbers of a block are regular.
    """
    blocks, lane = plan.local_blocks(rank), torch.arange(plan.block_len, dtype=torch.int32)
    padding = blocks.padding

    def column(x: Tensor) -> Tensor:
        return x.to(torch.int32)[:, None]

    # Compressed blocks that end no later than the query, at most those of its document. Padding sees nothing; its empty
    # interval stands where that of the token before it ends, so that no begin or end ever decreases.
    cmp_begin, whole = first_cmp[blocks.document], blocks.offset >= blocks.doc_len
    last_end = torch.where(whole, 0, first_cmp[blocks.document + 1])
    cmp_end = torch.clamp(
        column(cmp_begin + blocks.offset // cfg.cmp_stride) + (lane + 1 - cfg.cmp_block_len) // cfg.cmp_stride + 1,
        torch.where(whole, 0, cmp_begin).to(torch.int32)[:, None],
        column(last_end),
    )
    cmp_end = torch.maximum(cmp_end, column(cmp_end[:, -1].cummax(0).values) * column(whole))

    seen_begin = torch.where(padding, cmp_end, column(cmp_begin))
    is_short = column(blocks.offset < cfg.num_slc_blocks * plan.block_len).bool()

    row = win_halo.extended_rows.to(torch.int32).view(-1, plan.block_len)
    in_window = (column(blocks.offset) + lane).clamp_(max=cfg.window_len - 1)
    return {
        "position": (column(blocks.start) + lane).masked_fill_(padding, -1),
        "doc_start": column(blocks.start - blocks.offset).expand_as(padding).masked_fill(padding, 0),
        "cmp_begin": seen_begin,
        "cmp_end": cmp_end,
        "scored_end": torch.where(is_short, seen_begin, cmp_end),
        "win_begin": row - in_window.masked_fill_(padding, 0),
        "win_end": row + ~padding,
    }


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
    """Each rank's blocks stand in their order from row `rank * num_cmp_max` on; neighbours mostly share an owner."""
    rank, count = torch.unique_consecutive(owner, return_counts=True)
    order = rank.argsort(stable=True)
    before = torch.empty_like(count).index_copy_(0, order, count[order].cumsum(0) - count[order])
    per_rank = torch.bincount(owner, minlength=cp_size)
    return runs(rank * num_cmp_max + before - (per_rank.cumsum(0) - per_rank)[rank], count)


def _halo(plan: ShardPlan, rank: int, halo_len: int) -> tuple[Halo, Tensor]:
    """At most `halo_len` rows left of each segment, as far as its first token's document goes.

    And for each local block the extended row where its segment begins, behind the halo: int64 [T // l'].
    """
    holder, start, length = plan.all_segments
    document, offset = plan.locate(start)
    reach = offset.clamp(max=halo_len).masked_fill(document < 0, 0)
    # A piece is what a halo takes of one block, which one rank owns; counted over the halos of all ranks.
    first_block = (start - reach) // plan.block_len
    count = start // plan.block_len - first_block
    of = torch.arange(len(start)).repeat_interleave(count)
    block = runs(first_block, count)
    begin = torch.maximum(block * plan.block_len, (start - reach)[of])
    size = (block + 1) * plan.block_len - begin
    source, row = plan.owner(begin)
    destination = holder[of]

    # Row of each own segment's first halo row in the extended buffer, and of its first own row.
    own = holder == rank
    halo_at = ((reach + length) * own).cumsum(0) - (reach + length) * own
    sent, received = source == rank, destination == rank
    halo_row = halo_at[of] + begin - (start - reach)[of]
    # By source; ascending within one, as the source sends them.
    received = received.nonzero().squeeze(1)[source[received].argsort(stable=True)]

    first_row = (halo_at + reach)[own]

    def sizes(peer: Tensor, pieces: Tensor) -> tuple[int, ...]:
        zeros = torch.zeros(plan.cp_size, dtype=torch.int64)
        return tuple(zeros.index_add_(0, peer[pieces], size[pieces]).tolist())

    def most(peer: Tensor) -> int:
        """Rows of the rank that sends or receives most."""
        return int(torch.zeros(plan.cp_size, dtype=torch.int64).index_add_(0, peer, size).max())

    halo = Halo(
        num_rows=int((reach + length)[own].sum()),
        extended_rows=runs(first_row, length[own]),
        send_rows=runs(row[sent], size[sent]),
        recv_rows=runs(halo_row[received], size[received]),
        send_sizes=sizes(destination, sent),
        recv_sizes=sizes(source, received),
        most_sent=most(source),
        most_received=most(destination),
        pieces=HaloPieces(source, destination, size),
    )
    return halo, first_row.repeat_interleave(length[own] // plan.block_len)


def _interior(inside: Tensor, block_len: int) -> slice:
    """Of the longest run of blocks all of whose queries are `inside` [T // l', l']: at most T / 2 queries.

    Inside are those whose windows hold no halo row. The other half is left for after the halo, to be computed under the
    compressed all-gather.
    """
    edges = torch.nn.functional.pad(inside.all(1).int(), (1, 1)).diff().nonzero().squeeze(1)
    starts, stops = edges[::2], edges[1::2]
    stops = torch.minimum(stops, starts + inside.numel() // 2 // block_len)
    if len(starts) == 0 or int((stops - starts).max()) <= 0:
        return slice(0, 0)
    longest = int((stops - starts).argmax())
    return slice(int(starts[longest]) * block_len, int(stops[longest]) * block_len)


def _halo_to(halo: Halo, device: torch.device) -> Halo:
    return replace(
        halo,
        extended_rows=put_on(device, halo.extended_rows),
        send_rows=put_on(device, halo.send_rows),
        recv_rows=put_on(device, halo.recv_rows),
    )
