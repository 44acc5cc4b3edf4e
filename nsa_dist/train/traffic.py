"""What context parallelism moved in one step: counted bytes by kind and layer, the closed formulas beside them.

    sent_bytes        counted by `Traffic` on every rank, summed over all ranks of the run
    formula_bytes     `cp.formulas` for the same sequences or packs; of the pages it takes the number that was chosen,
                      so with whole_shard_fraction below 1 more is sent than it says
    union_fraction    u of each key/value head, chosen remote blocks / remote blocks, over all ranks and calls
    load_imbalance    keys attended by the busiest rank over the mean of all ranks, in closed form

Recomputing the attention runs its forward twice, and both are counted. What ranks ask each other about a layout (kind
`layout`, 16 bytes to each rank, once a plan) is left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from megatron.core.utils import get_pg_rank
from torch import Tensor

from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.formulas import cost
from nsa_dist.cp.formulas.batches import call_plan
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.deals import dealt_bytes
from nsa_dist.cp.formulas.groups import num_head_groups
from nsa_dist.cp.formulas.work import load_imbalance, rank_work
from nsa_dist.cp.options import MOST_IN_LINE
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore import NSASelfAttention
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.batches import Batch
from nsa_dist.train.data.packs import Pack
from nsa_dist.train.files.records import Record
from nsa_dist.train.heads import local_heads, projected_width
from nsa_dist.train.model import Trainable

_SUMS = ("remote blocks", "keys of the busiest rank", "keys")  # over the calls of a layer on this rank


@dataclass(frozen=True)
class Expected:
    """By the formulas, of one micro-batch in one layer on one rank."""

    sent_bytes: dict[str, int]
    busiest_keys: int  # attended by the rank of its group that attends most
    keys: int


@dataclass(frozen=True)
class TrafficMeter:
    """Counts a step on every rank and makes a record of the sum. A group of one sends nothing and counts nothing.

    Every rank packs its counts into one table [layers, columns], those of
    multi-token prediction behind the others, zeros where other ranks hold the layer or head:
    bytes by kind, the same by the formulas had nobody chosen a remote block, remote blocks chosen by the queries of
    each head, then `_SUMS`; in domains also pages of its shares, and those that neighbours passed on to it.
    """

    config: TrainConfig
    plan: ShardPlan  # of a sequence that is one document
    rank: int = 0  # of the context-parallel group
    one_sided: bool = False  # the transport of these groups
    watched: bool = True  # False: of a step that no record shows, of which nothing is counted or worked out
    expected: list[Expected] = field(default_factory=list)  # of the micro-batches of this step

    @property
    def is_on(self) -> bool:
        return self.watched and self.plan.cp_size > 1

    @contextmanager
    def counting(self, model: Trainable) -> Iterator[dict[int, Traffic]]:
        """Inside, this stage's attention layers count into the yielded {layer from 0: Traffic}."""
        counted: dict[int, Traffic] = {}
        with ExitStack() as stack:
            for layer, attention in model.attentions.items() if self.is_on else ():
                traffic = counted[layer] = Traffic()
                stack.enter_context(attention.core_attention.counting(traffic))
            yield counted

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step. What the formulas say of each is kept; its plan has much on the device."""
        self.expected.clear()
        for batch in batches:
            if self.is_on:
                self.expected.append(self._of_whole if batch.pack is None else self._of_pack(batch.pack))
            yield batch

    def pack(self, model: Trainable, counted: dict[int, Traffic]) -> Tensor:
        """This rank's table, flattened, fp64 (exact to 2**53 bytes) on the CPU; empty for a group of one."""
        if not self.is_on:
            return torch.zeros(0, dtype=torch.float64)
        table = torch.zeros(self._table_shape, dtype=torch.float64)
        kinds = self._kinds
        formula = [sum(micro.sent_bytes.get(kind, 0) for micro in self.expected) for kind in kinds]
        keys = [sum(micro.busiest_keys for micro in self.expected), sum(micro.keys for micro in self.expected)]
        for layer, attention in model.attentions.items():
            traffic = counted[layer]
            for kind, num_bytes in traffic.sent_bytes.items():
                if kind != "layout":
                    table[layer, kinds.index(kind)] = num_bytes
            table[layer, len(kinds) : 2 * len(kinds)] = torch.tensor(formula)
            table[layer, self._heads_of(attention)] = _chosen(traffic)
            table[layer, self._sums] = torch.tensor([sum(traffic.remote_blocks), *keys], dtype=torch.float64)
            if self._has_domains:
                table[layer, -2:] = torch.tensor(traffic.passed_on, dtype=torch.float64).sum(0)
        return table.flatten()

    def record(self, step: int, summed: Sequence[float]) -> Record:
        """The record of a step from the sum of all ranks' tables."""
        table = torch.tensor(summed, dtype=torch.float64).view(self._table_shape)
        layers = {str(layer + 1): self._layer(row) for layer, row in enumerate(table.tolist())}
        union_fractions = [u for layer in layers.values() for u in layer["union_fraction"]]
        return {
            "kind": "traffic",
            "step": step,
            "sent_bytes": _by_kind([layer["sent_bytes"] for layer in layers.values()]),
            "formula_bytes": _by_kind([layer["formula_bytes"] for layer in layers.values()]),
            "union_fraction": sum(union_fractions) / len(union_fractions),
            "load_imbalance": self._imbalance(table),
            "layers": layers,
        }

    @cached_property
    def load_imbalance(self) -> float:
        return load_imbalance(self.plan, self.config.nsa.sizes())

    @cached_property
    def head_groups(self) -> int:
        """Groups in which the kv heads of a call travel, had its samples one document each."""
        plan, heads, fetch = self._call_plan, self._heads, self.config.parallel.fetch_options()
        is_short = plan.tokens_per_rank * heads.num_q_heads * heads.dim_k <= MOST_IN_LINE
        return num_head_groups(plan, self.config.nsa.sizes(), heads, fetch, in_line=self.one_sided and is_short)

    # --- Columns ---------------------------------------------------------------------------------------------------

    @cached_property
    def _kinds(self) -> list[str]:
        return [*self._sent(self.plan), *(("tokens", "tokens.grad") if self.config.data.is_packed else ())]

    @property
    def _table_shape(self) -> tuple[int, int]:
        model = self.config.model
        return model.num_layers + model.num_mtp_layers, self._sums.stop + (2 if self._has_domains else 0)

    def _heads_of(self, attention: NSASelfAttention) -> slice:
        """The columns of this tensor-parallel rank's key/value heads."""
        num_local = self._heads.num_kv_heads
        first = 2 * len(self._kinds) + get_pg_rank(attention.pg_collection.tp) * num_local
        return slice(first, first + num_local)

    @property
    def _sums(self) -> slice:
        first = 2 * len(self._kinds) + self.config.model.num_query_groups
        return slice(first, first + len(_SUMS))

    @cached_property
    def _heads(self) -> HeadSizes:
        return local_heads(self.config)

    @cached_property
    def _has_domains(self) -> bool:
        return self.config.parallel.fetch_options().domain_of(self.plan.cp_size) > 1

    # --- A micro-batch on this rank, one layer -----------------------------------------------------------------------

    @cached_property
    def _of_whole(self) -> Expected:
        """Where it is no pack: of all the calls that compute some of its samples together."""
        return self._of_call(self._call_plan, self.config.run.micro_batch_size // self._call_plan.num_documents)

    @property
    def _call_plan(self) -> ShardPlan:
        return call_plan(self.plan, self.config.run.micro_batch_size, self._heads.num_q_heads * self._heads.dim_k)

    def _of_pack(self, pack: Pack) -> Expected:
        found = self._of_call(pack.rank_plan.plan)
        return replace(found, sent_bytes=found.sent_bytes | self._dealt(pack))

    def _of_call(self, plan: ShardPlan, times: int = 1) -> Expected:
        """Had nobody chosen a remote block; backward runs once, forward again where it is recomputed."""
        keys = [rank_work(plan, self.config.nsa.sizes(), rank).attended_keys for rank in range(plan.cp_size)]
        runs = self._forward_runs
        sent = {
            kind: times * (1 if kind.endswith(".grad") else runs) * num_bytes
            for kind, num_bytes in self._sent(plan).items()
        }
        return Expected(sent, times * max(keys), times * keys[self.rank])

    def _sent(self, plan: ShardPlan) -> dict[str, int]:
        """In one forward and backward of one call."""
        none, heads = [[0] * plan.cp_size] * plan.cp_size, self._heads
        halves = self.config.parallel.fetch_options().halves_queries(heads.num_kv_heads)
        return cost.sent_bytes(
            plan, self.config.nsa.sizes(), heads, none, refetch=True, halves=halves, one_sided=self.one_sided,
            inside=none if self._has_domains else None,
        )[self.rank]  # fmt: skip

    def _dealt(self, pack: Pack) -> dict[str, int]:
        """Of tokens that were cut from their blocks; what is recomputed has them already."""
        given, plan, heads = pack.rank_plan.given, pack.rank_plan.plan, self._heads
        if given is plan:
            return {}
        widths = projected_width(self.config), heads.num_q_heads * heads.dim_v
        return dealt_bytes(given, plan, *widths, heads.element_bytes)[self.rank]

    # --- All ranks -------------------------------------------------------------------------------------------------

    def _layer(self, row: list[float]) -> Record:
        """One layer's entry of the record, from its row of the summed table."""
        kinds = self._kinds
        counted, formula = row[: len(kinds)], row[len(kinds) : 2 * len(kinds)]
        chosen = row[2 * len(kinds) : self._sums.start]
        remote = row[self._sums.start] / self.config.parallel.tensor_model_parallel_size  # of one head
        fixed = {kind: int(num_bytes) for kind, num_bytes in zip(kinds, formula, strict=True)}
        return {
            "union_fraction": [blocks / max(1, remote) for blocks in chosen],
            "sent_bytes": {kind: int(num_bytes) for kind, num_bytes in zip(kinds, counted, strict=True)},
            "formula_bytes": fixed | self._page_bytes(self._moved(int(sum(chosen)), row[-2:])),
        }

    def _imbalance(self, table: Tensor) -> float:
        """Over all calls, the busiest rank of each; NSA layers are alike, dense ones have no keys here."""
        busiest, own = table[:, self._sums].sum(0).tolist()[1:]
        return busiest / own if own else 1.0

    @property
    def _forward_runs(self) -> int:
        return 2 if self.config.model.recompute_attention else 1

    def _moved(self, chosen: int, passed_on: Sequence[float]) -> dict[str, int]:
        """Pages by what is added to the kind, summed over all forward runs of all ranks."""
        if not self._has_domains:
            return {"": chosen}
        entered, passed = map(int, passed_on)
        return {"": entered, ".inside": passed}

    def _page_bytes(self, moved: dict[str, int]) -> dict[str, int]:
        """Of the pages that were moved."""
        heads = self._heads
        found: dict[str, int] = {}
        page = self.plan.block_len * (heads.dim_k + heads.dim_v)
        runs = self._forward_runs + (not self.config.parallel.keep_pages)
        for suffix, number in moved.items():
            once = number // self._forward_runs * page  # recomputation chooses the same blocks
            found |= {
                f"pages{suffix}": runs * once * heads.element_bytes,
                f"pages.grad{suffix}": once * heads.grad_bytes,
            }
        return found


def _chosen(traffic: Traffic) -> Tensor:
    """Remote blocks chosen, summed over calls: [local key/value heads]."""
    remote = torch.tensor(traffic.remote_blocks, dtype=torch.float64)[:, None]
    return (torch.tensor(traffic.union_fractions, dtype=torch.float64) * remote).round().sum(0)  # rounded numbers


def _by_kind(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(part[kind] for part in parts) for kind in parts[0]}
