"""How the selected-attention kernels address pages: the rank's own where they lie, fetched ones in a buffer beside.

And which queries see no more blocks than are chosen, and so take the short way (`nsa_kernels.ShortRows`). A query's
place in its document decides, never the selection: so its result has the same bits on any rank, in any stage, in a
pack or alone, in training and in prefill. Their keys are the first blocks of their documents. Where all of them are
rows of this rank, each document's in a row, they are read there; else they are copied through the table of pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.call import Call, Stage
from nsa_dist.cp.layout import RankLayout
from nsa_dist.cp.plan import runs
from nsa_dist.cp.sent.routes import Route

if TYPE_CHECKING:
    from nsa_kernels import ShortRows
    from nsa_kernels.selected.short import ShortPlaces


@dataclass(frozen=True)
class Fetched:
    """Pages [n, l', Dk + Dv] of one round that are here, in the order of its route."""

    pages: Tensor
    route: Route


def page_table(stage: Stage, k: Tensor, fetched: Sequence[Fetched], layout: RankLayout, *, own: bool) -> Tensor:
    """block_table int32 [h, num_blocks] of a stage's heads: global block -> page; -1 for blocks that are not here.

    Pages 0 .. T / l' - 1 are those of the rank's own k [T, ...], left out unless `own`; then come fetched ones.
    """
    heads, num_local = stage.kv_heads.stop - stage.kv_heads.start, len(layout.local_blocks)
    if own and not fetched:
        return layout.own_pages.expand(heads, -1)
    if own:
        table = layout.own_pages.repeat(heads, 1)
    else:
        table = torch.full((heads, len(layout.block_owner)), -1, dtype=torch.int32, device=k.device)
    for part in fetched:
        table[part.route.recv_head, part.route.recv_block] = torch.arange(
            num_local, num_local + len(part.pages), dtype=torch.int32, device=k.device
        )
        num_local += len(part.pages)
    return table


def only_here(block_indices: Tensor, table: Tensor) -> Tensor:
    """The ids whose page is in the table, still ascending with -1 last."""
    head = torch.arange(table.shape[0], device=table.device)[:, None]
    here = (block_indices >= 0) & (table[head, block_indices.clamp(min=0).long()] >= 0)
    none = table.shape[1]
    ids = block_indices.masked_fill(~here, none).sort(-1).values
    return ids.masked_fill(ids == none, -1)


def page_arguments(
    stage: Stage, k: Tensor, fetched: Sequence[Fetched], table: Tensor, call: Call, *, all_here: bool
) -> dict[str, Any]:
    """What `selected_attention` and its backward take besides tensors of the queries and the rank's own pages.

    all_here    whether these are all the blocks that the stage's queries chose
    """
    arguments = {
        **(short_of(stage, call) if all_here else {}),
        "block_table": table,
        "position": stage.of_rows(call.layout.position),
        "slc_block_len": call.cfg.slc_block_len,
        "softmax_scale": call.softmax_scale,
    }
    if fetched:
        pages = fetched[0].pages if len(fetched) == 1 else torch.cat([part.pages for part in fetched])
        dim_k = k.shape[2]
        arguments |= {"k_remote": pages[..., :dim_k], "v_remote": pages[..., dim_k:]}
    return arguments


def round_name(kind: str, stage: Stage, number: int) -> str:
    """In the trace: `pages[2]` is what stage 2 fetches, `pages[2,1]` its second round."""
    return f"{kind}[{stage.number}]" if number == 0 else f"{kind}[{stage.number},{number}]"


def short_of(stage: Stage, call: Call) -> dict[str, Any]:
    """The option of selected attention for a stage's queries, all of whose chosen blocks are at hand."""
    return short_option(short_rows(call.layout, stage.rows, call.cfg, call.ops))


def all_blocks_of(stage: Stage, call: Call) -> Tensor | None:
    """block_indices of a stage's queries, if all of them take the short way: there is nothing to select then."""
    return all_blocks(call.layout, stage.rows, stage.kv_heads.stop - stage.kv_heads.start, call.cfg, call.ops)


class QueryBlocks(NamedTuple):
    """Blocks of l' query rows, in the order of the rows, documents ascending, on the CPU."""

    document: Tensor  # int64 [B]
    first_block: Tensor  # int64 [B]: global id of the document's first block
    number: Tensor  # int64 [B]: which block of its document it is
    visible: Tensor  # bool [B, l']: rows that are tokens


def short_rows(layout: RankLayout, rows: slice, cfg: NSAConfig, ops: ModuleType) -> "ShortRows | None":
    """Of the queries `rows` of a rank, whole blocks; None if there are none, or `ops` do not know them.

    Kept with the plan. The first call is not to be one that is recorded or captured.
    """
    if not _knows(ops, cfg):
        return None

    def compute() -> "ShortRows | None":
        length, plan = cfg.slc_block_len, layout.host.plan
        owner, first_row = plan.owner(torch.arange(plan.num_blocks) * length)
        pages = torch.where(owner == layout.host.rank, first_row // length, -1)
        return ops.ShortRows.of(_places(_query_blocks(layout, rows), cfg, pages), layout.position[rows])

    key = ("short", cfg, layout.host.rank, layout.position.device, rows.start, rows.stop)
    return layout.host.plan.memo(key, compute)


def all_blocks(layout: RankLayout, rows: slice, num_kv_heads: int, cfg: NSAConfig, ops: ModuleType) -> Tensor | None:
    """block_indices int32 [T, Hkv, n] of the queries `rows` if all of them take the short way; else None."""
    found = short_rows(layout, rows, cfg, ops)
    if found is None or found.others.start < found.others.stop:
        return None

    def compute() -> Tensor:
        queries, slot = _query_blocks(layout, rows), torch.arange(cfg.num_slc_blocks)
        ids = torch.where(slot <= queries.number[:, None], queries.first_block[:, None] + slot, -1)  # [B, n]
        ids = torch.where(queries.visible[..., None], ids[:, None], -1).flatten(0, 1).to(torch.int32)
        return ids[:, None].expand(-1, num_kv_heads, -1).contiguous().to(layout.position.device)

    key = ("all blocks", cfg, layout.host.rank, layout.position.device, rows.start, rows.stop, num_kv_heads)
    return layout.host.plan.memo(key, compute)


def short_rows_of(queries: QueryBlocks, position: Tensor, cfg: NSAConfig, ops: ModuleType) -> "ShortRows | None":
    """The same of queries at `position` [T] whose keys all come through a table of pages."""
    return ops.ShortRows.of(_places(queries, cfg, None), position) if _knows(ops, cfg) else None


def short_option(found: "ShortRows | None") -> dict[str, Any]:
    """What `selected_attention` and its backward take besides."""
    return {} if found is None else {"short": found}


def _query_blocks(layout: RankLayout, rows: slice) -> QueryBlocks:
    blocks = layout.host.plan.local_blocks(layout.host.rank)
    length = blocks.padding.shape[1]
    of = slice(rows.start // length, rows.stop // length)
    start, document, offset, padding = (x[of] for x in (blocks.start, blocks.document, blocks.offset, blocks.padding))
    return QueryBlocks(document, (start - offset) // length, offset // length, ~padding)


def _knows(ops: ModuleType, cfg: NSAConfig) -> bool:
    return hasattr(ops, "ShortRows") and ops.ShortRows.takes(cfg.slc_block_len)


def _places(queries: QueryBlocks, cfg: NSAConfig, pages: Tensor | None) -> "ShortPlaces":
    """pages       int64 [num_blocks]: the rank's own page of each global block, -1 if it is elsewhere; None: unknown"""
    from nsa_kernels.selected.short import ShortPlaces

    document, first_block, number, visible = queries
    length = visible.shape[1]
    is_real = visible.any(1)
    # Blocks of padding alone go with those before them, so that few ranges of rows are cut.
    before = torch.where(is_real, torch.arange(len(is_real)), -1).cummax(0).values
    is_short = (before >= 0) & (number < cfg.num_slc_blocks)[before.clamp(min=0)]
    seen = is_short & is_real
    first_key, blocks = _keys(document[seen], first_block[seen], number[seen], pages)
    begin = torch.zeros(len(is_real), dtype=torch.int64)
    begin[seen] = first_key * length
    sees = visible & seen[:, None]
    end = (begin + number * length)[:, None] + torch.arange(1, length + 1)
    end = torch.where(sees, end, 0).flatten().cummax(0).values
    begin = torch.where(sees.flatten(), begin.repeat_interleave(length), end)
    return ShortPlaces(is_short, begin.to(torch.int32), end.to(torch.int32), blocks)


def _keys(document: Tensor, first_block: Tensor, number: Tensor, pages: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """For each block of queries where its document's keys begin, in blocks; and which blocks are copied there."""
    if pages is not None:
        first_page = pages[first_block]
        in_place = (first_page >= 0) & (pages[first_block + number] - first_page == number)
        if bool(in_place.all()):
            return first_page, None
    of = torch.unique_consecutive(document, return_inverse=True)[1]
    num_documents = int(of.max()) + 1 if len(of) else 0
    count = torch.zeros(num_documents, dtype=torch.int64).scatter_reduce(0, of, number + 1, "amax")
    first = torch.zeros(num_documents, dtype=torch.int64).index_copy_(0, of, first_block)
    return (count.cumsum(0) - count)[of], runs(first, count)
