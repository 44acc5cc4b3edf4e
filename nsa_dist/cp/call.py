"""What all parts of one call of `nsa_attention` on one rank have in common, and how its work is cut into stages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.groups import num_head_groups
from nsa_dist.cp.layout import RankLayout
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.sent.domains import Domains

if TYPE_CHECKING:
    from nsa_kernels import Tapes


@dataclass(frozen=True)
class Call:
    """The same in forward and backward, for all branches and stages."""

    cfg: NSAConfig
    layout: RankLayout
    comm: Comm
    ops: ModuleType
    fetch: FetchOptions
    softmax_scale: float
    tiles: dict[str, bool] = field(default_factory=dict)  # options of the attention of intervals, cmp and win
    tapes: Mapping[str, "Tapes"] = field(default_factory=dict)  # of the parts of a short call
    sent: dict[tuple, dict[str, int]] = field(default_factory=dict)  # what such parts send, by kind

    @property
    def domains(self) -> Domains:
        """In which pages are sent."""
        return Domains(self.fetch.domain_of(self.comm.size), self.comm.size, self.comm.rank)

    def sum_dtype(self, x: Tensor) -> torch.dtype | None:
        """Of gradients to which those of other ranks or rounds are added: fp32 or better. One rank: None, as x."""
        return None if self.comm.size == 1 else torch.promote_types(x.dtype, torch.float32)

    def run(
        self, part: str, body: Callable[[list[Tensor]], Sequence[Tensor]], inputs: list[Tensor]
    ) -> Sequence[Tensor]:
        """`body(inputs)`; where the part has tapes, by what they recorded (`nsa_kernels.Tapes`).

        A repetition sends what the recorded call sent, and counts it.
        """
        if part not in self.tapes:
            return body(inputs)
        if self.comm.size == 1:
            return self.tapes[part].run(body, inputs)
        key = (part, *((x.shape, x.dtype) for x in inputs))
        sent: dict[str, int] = {}
        with self.comm.traffic.noting(sent):
            results = self.tapes[part].run(body, inputs)
        if sent:
            self.sent[key] = sent
        for kind, num_bytes in self.sent.get(key, {}).items():
            self.comm.traffic.add(kind, num_bytes)
        return results


def cut(x: Tensor, rows: slice, heads: slice | None = None) -> Tensor:
    """`x[rows, heads]`, a view; `x` itself where that is all of it, a view costs the host 4 us, and a layer has 30."""
    all_rows = rows.stop - rows.start == x.shape[0]
    if heads is None or heads.stop - heads.start == x.shape[1]:
        return x if all_rows else x[rows]
    return x[rows, heads]


@dataclass(frozen=True)
class Stage:
    """A part of the compressed and selected branches whose remote pages travel together: some heads, some queries."""

    number: int
    kv_heads: slice
    q_heads: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """Its queries and query heads of x [T, Hq, ...], a view."""
        return cut(x, self.rows, self.q_heads)

    def of_keys(self, x: Tensor) -> Tensor:
        """Its kv heads of all rows of x [R, Hkv, ...], a view."""
        return x if x.shape[1] == self.kv_heads.stop - self.kv_heads.start else x[:, self.kv_heads]

    def of_rows(self, x: Tensor) -> Tensor:
        """Its queries of x [T, ...], a view."""
        return cut(x, self.rows)


def head_groups(heads: HeadSizes, num_tokens: int, call: Call) -> list[Stage]:
    """All queries, kv head by kv head or a few at a time: `formulas.groups`. One rank: one stage."""
    count, num_kv_heads = 1, heads.num_kv_heads
    if call.comm.size > 1:
        count = num_head_groups(call.layout.host.plan, call.cfg, heads, call.fetch, in_line=call.comm.in_line)
    group = heads.num_q_heads // num_kv_heads
    bounds = [num_kv_heads * i // count for i in range(count + 1)]
    return [
        Stage(number, slice(a, b), slice(a * group, b * group), slice(0, num_tokens))
        for number, (a, b) in enumerate(pairwise(bounds))
    ]


def forward_stages(groups: list[Stage], num_kv_heads: int, call: Call) -> list[Stage]:
    """The head groups, or halves of queries (`FetchOptions`), the second of which fetches what the first did not."""
    if call.comm.size == 1 or call.comm.in_line or not call.fetch.halves_queries(num_kv_heads):
        return groups
    first, stop = groups[0], groups[0].rows.stop
    block_len = call.cfg.slc_block_len
    middle = stop // 2 // block_len * block_len  # a tile of queries then holds no more documents than before
    return [
        Stage(i, first.kv_heads, first.q_heads, slice(*rows)) for i, rows in enumerate([(0, middle), (middle, stop)])
    ]
