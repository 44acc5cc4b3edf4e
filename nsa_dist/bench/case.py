"""What is measured: one layer of attention over one document, one way of bringing in the remote keys and values."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.work import backward_flops, forward_flops, rank_work
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.plan import ShardPlan

Mode = Literal["fetch", "whole shard", "all-gather", "shared all-gather"]
MODES: tuple[Mode, ...] = ("fetch", "whole shard", "all-gather", "shared all-gather")
UNION_FRACTIONS = (0.05, 0.2, 1.0)
HEAD_GROUPS = 4  # as of a long call
_FLOPS = (forward_flops, backward_flops)
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Case:
    """`tokens` tokens over `cp_size` ranks.

    union_fraction  u: share of a rank's remote blocks that its queries choose together, for every kv head. More than
                    a rank can see means all it can see. Without meaning where all of K and V is gathered
    mode            fetch: chosen pages; whole shard: every page of an owner of whom any is chosen; all-gather: raw
                    K and V of all branches, compressed again on every rank; shared all-gather: the same of one K/V pair
                    that all branches share, another layer, gathered one kv head at a time
    """

    tokens: int
    cp_size: int
    mode: Mode = "fetch"
    union_fraction: float = 0.2
    heads: HeadSizes = field(default_factory=lambda: HeadSizes(64, 4, 128, 128))
    cfg: NSAConfig = field(default_factory=NSAConfig)
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    page_budget_bytes: int | None = None  # fetched pages held at once
    head_groups: int | None = HEAD_GROUPS  # in which the kv heads travel; without meaning where all is gathered
    transport: str = "auto"  # FetchOptions.transport

    @property
    def name(self) -> str:
        dims = f"{self.heads.dim_k}/{self.heads.dim_v}"
        return f"{_short(self.tokens)} cp{self.cp_size} {dims} {self.way}"

    @property
    def way(self) -> str:
        """How remote keys and values come in."""
        if self.cp_size == 1:
            return "one rank"
        way: str = self.mode
        if self.mode == "fetch":
            budget = f", {self.page_budget_bytes / 2**20:g} MiB" if self.page_budget_bytes else ""
            way += f" u={self.union_fraction:g}{budget}"
        if not self.gathers and self.head_groups not in (None, HEAD_GROUPS):
            way += f", head groups {self.head_groups}"
        if self.transport != "auto":
            way += f", {self.transport}"
        return way

    @property
    def gathers(self) -> bool:
        """Whether raw K and V of all tokens go to every rank."""
        return self.mode in ("all-gather", "shared all-gather")

    @property
    def shared_kv(self) -> bool:
        """Whether the branches share one K/V pair."""
        return self.mode == "shared all-gather"

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.heads.element_bytes]

    @property
    def fetch_options(self) -> FetchOptions:
        fraction = 1e-9 if self.mode == "whole shard" else 1.0
        return FetchOptions(self.page_budget_bytes, fraction, transport=self.transport, head_groups=self.head_groups)

    def plan(self) -> ShardPlan:
        make = {"zigzag": ShardPlan.zigzag, "contiguous": ShardPlan.contiguous}[self.layout]
        return make([0, self.tokens], self.cp_size, self.cfg.slc_block_len)

    def flops(self) -> int:
        """Of the busiest rank, forward and backward; phi is an MLP as wide as the head."""
        plan, dims = self.plan(), (self.heads.dim_k, self.heads.dim_v)

        def of(rank: int) -> int:
            work = rank_work(plan, self.cfg, rank)
            return sum(sum(count(work, self.heads, self.cfg, dims).values()) for count in _FLOPS)

        return max(of(rank) for rank in range(self.cp_size))

    def as_data(self) -> dict[str, Any]:
        return {"case": self.name, "way": self.way, **asdict(self)}


def ways(
    case: Case,
    union_fractions: tuple[float, ...] = UNION_FRACTIONS,
    head_groups: tuple[int | None, ...] = (HEAD_GROUPS,),
) -> Iterator[Case]:
    """`case` in every mode: fetching at each u, whole shards, each in so many groups of heads; both all-gathers.

    One rank has nothing to fetch.
    """
    if case.cp_size == 1:
        yield case
        return
    for u in union_fractions:
        yield from (replace(case, mode="fetch", union_fraction=u, head_groups=groups) for groups in head_groups)
    yield from (replace(case, mode="whole shard", head_groups=groups) for groups in head_groups)
    yield replace(case, mode="all-gather")
    yield replace(case, mode="shared all-gather")


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
