"""What context parallelism moved in one step: counted bytes by kind and layer, the closed formulas beside them.

    sent_bytes        counted by `Traffic` on every rank, summed over all ranks of the run
    formula_bytes     `cp.formulas.cost` for the same sequences; of the pages it takes the number that was chosen, so
                      with whole_shard_fraction below 1 more is sent than it says
    union_fraction    u of each key/value head, chosen remote blocks / remote blocks, the mean over ranks and sequences
    load_imbalance    keys attended by the busiest rank over the mean of all ranks, in closed form

Recomputing the attention runs its forward twice, and both are counted. The one check of the layouts at the start of a
run (kind `layout`, 16 bytes to each rank) is left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.utils import get_pg_rank
from torch import Tensor

from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.formulas import cost
from nsa_dist.cp.formulas.batches import call_plan
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.groups import num_head_groups
from nsa_dist.cp.formulas.work import load_imbalance
from nsa_dist.cp.options import MOST_IN_LINE
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore import NSASelfAttention
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.files.records import Record
from nsa_dist.train.heads import local_heads
from nsa_dist.train.model import Trainable


@dataclass(frozen=True)
class TrafficMeter:
    """Counts a step on every rank and makes a record of the sum. A group of one sends nothing and counts nothing.

    Every rank packs its counts into one table [num_layers, columns], zeros where other ranks hold the layer or head:
    bytes by kind, then remote blocks chosen by the queries of each head; in domains also pages of its shares, and those
    that neighbours passed on to it.
    """

    config: TrainConfig
    plan: ShardPlan
    one_sided: bool = False  # the transport of the context-parallel groups

    @property
    def is_on(self) -> bool:
        return self.plan.cp_size > 1

    @contextmanager
    def counting(self, model: Trainable) -> Iterator[dict[int, Traffic]]:
        """Inside, this stage's attention layers count into the yielded {layer from 0: Traffic}."""
        counted: dict[int, Traffic] = {}
        with ExitStack() as stack:
            for attention in model.attentions if self.is_on else ():
                traffic = counted[attention.layer_number - 1] = Traffic()
                stack.enter_context(attention.core_attention.counting(traffic))
            yield counted

    def pack(self, model: Trainable, counted: dict[int, Traffic]) -> Tensor:
        """This rank's table, flattened, fp64 (exact to 2**53 bytes) on the CPU; empty for a group of one."""
        if not self.is_on:
            return torch.zeros(0, dtype=torch.float64)
        table = torch.zeros(self._table_shape, dtype=torch.float64)
        for attention in model.attentions:
            layer = attention.layer_number - 1
            for kind, num_bytes in counted[layer].sent_bytes.items():
                if kind != "layout":
                    table[layer, self._kinds.index(kind)] = num_bytes
            table[layer, self._heads_of(attention)] = self._chosen(counted[layer])
            if self._has_domains:
                table[layer, -2:] = torch.tensor(counted[layer].passed_on, dtype=torch.float64).sum(0)
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
            "load_imbalance": self.load_imbalance,
            "layers": layers,
        }

    @cached_property
    def load_imbalance(self) -> float:
        return load_imbalance(self.plan, self.config.nsa.sizes())

    @cached_property
    def head_groups(self) -> int:
        """Groups in which the kv heads of a call travel."""
        plan, heads, fetch = self._call_plan, self._heads, self.config.parallel.fetch_options()
        is_short = plan.tokens_per_rank * heads.num_q_heads * heads.dim_k <= MOST_IN_LINE
        return num_head_groups(plan, self.config.nsa.sizes(), heads, fetch, in_line=self.one_sided and is_short)

    # --- Counted ---------------------------------------------------------------------------------------------------

    @property
    def _kinds(self) -> list[str]:
        return list(self._fixed_bytes)

    @property
    def _table_shape(self) -> tuple[int, int]:
        columns = len(self._kinds) + self.config.model.num_query_groups + (2 if self._has_domains else 0)
        return self.config.model.num_layers, columns

    def _heads_of(self, attention: NSASelfAttention) -> slice:
        """The columns of this tensor-parallel rank's key/value heads."""
        num_local = self._heads.num_kv_heads
        first = len(self._kinds) + get_pg_rank(attention.pg_collection.tp) * num_local
        return slice(first, first + num_local)

    def _chosen(self, traffic: Traffic) -> Tensor:
        """Remote blocks chosen, summed over calls: [local key/value heads]."""
        fractions = torch.tensor(traffic.union_fractions, dtype=torch.float64)  # [calls, heads], rounded numbers
        return (fractions * self._num_remote).round().sum(0)

    @property
    def _num_remote(self) -> int:
        """Selection blocks of a call that a rank does not hold."""
        plan = self._call_plan
        return plan.num_blocks - plan.tokens_per_rank // plan.block_len

    @cached_property
    def _call_plan(self) -> ShardPlan:
        """Of the samples that one call of a layer computes together."""
        return call_plan(self.plan, self.config.run.micro_batch_size, self._heads.num_q_heads * self._heads.dim_k)

    @property
    def _calls(self) -> int:
        """Of a layer in one step, over all replicas."""
        return self.config.run.global_batch_size // self._call_plan.num_documents

    # --- Formulas --------------------------------------------------------------------------------------------------

    def _layer(self, row: list[float]) -> Record:
        """One layer's entry of the record, from its row of the summed table."""
        kinds = self._kinds
        chosen = row[len(kinds) : len(kinds) + self.config.model.num_query_groups]
        calls = self._calls * self._forward_runs * self.plan.cp_size  # of a head, over all ranks
        return {
            "union_fraction": [blocks / (calls * self._num_remote) for blocks in chosen],
            "sent_bytes": {kind: int(num_bytes) for kind, num_bytes in zip(kinds, row, strict=False)},
            "formula_bytes": self._fixed_bytes | self._page_bytes(self._moved(int(sum(chosen)), row[-2:])),
        }

    @property
    def _forward_runs(self) -> int:
        return 2 if self.config.model.recompute_attention else 1

    @cached_property
    def _heads(self) -> HeadSizes:
        return local_heads(self.config)

    @cached_property
    def _fixed_bytes(self) -> dict[str, int]:
        """By kind, of one layer and step over all ranks, had nobody chosen a remote block."""
        none, heads = [[0] * self.plan.cp_size] * self.plan.cp_size, self._heads
        halves = self.config.parallel.fetch_options().halves_queries(heads.num_kv_heads)
        ranks = cost.sent_bytes(
            self._call_plan, self.config.nsa.sizes(), heads, none, refetch=True, halves=halves,
            one_sided=self.one_sided, inside=none if self._has_domains else None,
        )  # fmt: skip
        groups = self._calls * self.config.parallel.tensor_model_parallel_size
        return {
            kind: groups * (1 if kind.endswith(".grad") else self._forward_runs) * num_bytes
            for kind, num_bytes in _by_kind(ranks).items()
        }

    @cached_property
    def _has_domains(self) -> bool:
        return self.config.parallel.fetch_options().domain_of(self.plan.cp_size) > 1

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


def _by_kind(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(part[kind] for part in parts) for kind in parts[0]}
