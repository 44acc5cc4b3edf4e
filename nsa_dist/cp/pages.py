"""How the selected-attention kernels address pages: the rank's own where they lie, fetched ones in a buffer beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_dist.cp.call import Call, Stage
from nsa_dist.cp.layout import RankLayout
from nsa_dist.cp.sent.routes import Route


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
        **(call.short(stage.rows) if all_here else {}),
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
