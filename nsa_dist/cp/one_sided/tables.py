"""What ranks that read each other's memory need to know of a layout, int32 tensors, made when somebody first asks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa_dist.cp.device import put_on
from nsa_dist.cp.layout import Halo, RankLayout
from nsa_dist.cp.plan import runs


@dataclass(frozen=True)
class BlockHolders:
    """Where the selection blocks of the whole sequence lie."""

    owner: Tensor  # [num_blocks]: the rank that holds it
    page: Tensor  # [num_blocks]: its page there
    place: Tensor  # [num_blocks]: its number among the blocks that other ranks hold, ascending; -1 if it is own
    remote: Tensor  # [num_blocks - T // l']: the blocks that other ranks hold, ascending
    tables: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)  # made of these, by heads


@dataclass(frozen=True)
class HaloTables:
    """Where each extended row is to be read, and where other ranks have put the gradients of their copies of a row."""

    origin: Tensor  # [E]: the rank that sends it, -1 for own rows
    source_row: Tensor  # [E]: its number among all rows that rank sends, or the own row
    sent_number: Tensor  # [T]: numbers the rows that are sent, -1 for the others
    sent_table: Tensor  # [P, copies, numbers]: that of each copy among all rows that a rank receives, or -1


@dataclass(frozen=True)
class ReaderTables:
    """Of one rank."""

    blocks: BlockHolders
    cmp_halo: HaloTables
    win_halo: HaloTables
    cmp_origin: Tensor  # [num_cmp_rows]: rank of each compressed row, and its number there, -1 between documents
    cmp_source_row: Tensor
    cmp_own_number: Tensor  # [own blocks]: 0, 1, ...
    cmp_own_rows: Tensor  # [1, 1, own blocks]: compressed row of each own block, the same on all ranks


def reader_tables(layout: RankLayout) -> ReaderTables:
    """Those of a layout, kept with it."""
    if "reader tables" not in layout.kept:
        layout.kept["reader tables"] = _make(layout)
    return layout.kept["reader tables"]


def _make(layout: RankLayout) -> ReaderTables:
    known = layout.host
    owner = known.cmp_owner
    at = torch.arange(len(owner)) if known.cmp_place is None else known.cmp_place
    number = known.cmp_gather_rows - owner * layout.num_cmp_max
    own_rows = at[owner == known.rank]
    return ReaderTables(
        blocks=_block_holders(layout),
        cmp_halo=_halo_tables(known.cmp_halo, layout),
        win_halo=_halo_tables(known.win_halo, layout),
        cmp_origin=_put(torch.zeros(layout.num_cmp_rows, dtype=torch.int64).index_copy_(0, at, owner), layout),
        cmp_source_row=_put(torch.full((layout.num_cmp_rows,), -1).index_copy_(0, at, number), layout),
        cmp_own_number=_put(torch.arange(len(own_rows)), layout),
        cmp_own_rows=_put(own_rows[None, None], layout),
    )


def _block_holders(layout: RankLayout) -> BlockHolders:
    plan = layout.host.plan
    owner, row = plan.owner(torch.arange(plan.num_blocks) * plan.block_len)
    is_remote = owner != layout.host.rank
    place = torch.where(is_remote, is_remote.cumsum(0) - 1, -1)
    found = owner, row // plan.block_len, place, is_remote.nonzero().squeeze(1)
    owner, page, place, remote = (_put(x, layout) for x in found)
    return BlockHolders(owner, page, place, remote)


def _halo_tables(halo: Halo, layout: RankLayout) -> HaloTables:
    """halo        on the CPU"""
    size, rank = layout.host.plan.cp_size, layout.host.rank
    between = torch.zeros(size, size, dtype=torch.int64)  # rows by [source, destination]
    between.index_put_((halo.pieces.source, halo.pieces.destination), halo.pieces.size, accumulate=True)
    ranks, received, sent = torch.arange(size), between[:, rank], between[rank]
    origin = torch.full((halo.num_rows,), -1).index_copy_(0, halo.recv_rows, ranks.repeat_interleave(received))
    source_row = torch.empty(halo.num_rows, dtype=torch.int64)
    source_row.index_copy_(0, halo.extended_rows, torch.arange(len(halo.extended_rows)))
    source_row.index_copy_(0, halo.recv_rows, runs(between[:, :rank].sum(1), received))
    unique, column = halo.send_rows.unique(return_inverse=True)
    # The halos of a rank's segments may overlap: it then has a row more than once.
    key = ranks.repeat_interleave(sent) * len(unique) + column
    order = key.argsort(stable=True)
    _, counts = key.unique(return_counts=True)
    again = torch.empty_like(key).index_copy_(0, order, runs(torch.zeros_like(counts), counts))
    table = torch.full((size, int(counts.max()) if len(counts) else 1, len(unique)), -1)
    table[ranks.repeat_interleave(sent), again, column] = runs(between[:rank].sum(0), sent)
    number = torch.full((len(halo.extended_rows),), -1).index_copy_(0, unique, torch.arange(len(unique)))
    return HaloTables(*(_put(x, layout) for x in (origin, source_row, number, table)))


def _put(x: Tensor, layout: RankLayout) -> Tensor:
    return put_on(layout.position.device, x.to(torch.int32))
