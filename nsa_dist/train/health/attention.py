"""Gates, selection and compression of every NSA layer, seen in the forward of one step.

    gates               of each branch: the mean over tokens and heads, the shares below 0.05 and above 0.95
    selection_entropy   of each key/value head, nats: of how often each block is chosen, counted from the first of its
                        document, forced choices left out.
                        ln(number of blocks) if all are chosen alike, 0 if one alone is
    phi_norm            of each weight of the two compressors, over all heads

The sums are over the whole batch, so the values do not depend on how the batch, the sequence or the heads are cut.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_pg_rank
from torch import Tensor

from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore import NSASelfAttention
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.model import Trainable
from nsa_dist.train.world import World

BRANCHES = ("cmp", "slc", "win")
LOW, HIGH = 0.05, 0.95


@dataclass
class Seen:
    """Sums of one layer over this rank's tokens and heads, fp64."""

    gates: Tensor  # [4, 3]: number of gates, their sum, how many are low, how many high; by branch
    chosen: Tensor  # [Hkv of the rank, blocks]

    def add(self, gates: Tensor, block_indices: Tensor, is_free: Tensor) -> None:
        """gates [T, Hq, 3], block_indices [T, Hkv, n], is_free bool [T, Hkv, n]: a choice, and not a forced one."""
        flat = gates.detach().double().flatten(0, 1)
        counts = torch.full((3,), float(len(flat)), dtype=torch.float64, device=flat.device)
        self.gates += torch.stack([counts, flat.sum(0), (flat < LOW).sum(0), (flat > HIGH).sum(0)])
        for head in range(len(self.chosen)):
            ids = block_indices[:, head][is_free[:, head]].long()
            self.chosen[head] += torch.bincount(ids, minlength=self.chosen.shape[1])


@dataclass(frozen=True)
class AttentionMeter:
    """Watches this stage's layers during a step and makes records of what all ranks saw."""

    config: TrainConfig
    plan: ShardPlan
    world: World
    seen: dict[int, Seen] = field(default_factory=dict)  # by layer from 0

    @contextmanager
    def watching(self, model: Trainable) -> Iterator[None]:
        """Inside, every forward of a layer is added up; a recomputed one twice, which no mean or share shows."""
        self.seen.clear()
        heads = self.config.model.num_query_groups // self.config.parallel.tensor_model_parallel_size
        with ExitStack() as stack:
            for layer, attention in model.attentions.items():
                seen = self.seen[layer] = Seen(*map(self._zeros_of, self._shapes(heads)))

                def observe(gates: Tensor, block_indices: Tensor, own_block: Tensor, seen: Seen = seen) -> None:
                    seen.add(gates, block_indices, self._is_free(block_indices, own_block[:, None, None]))

                stack.enter_context(attention.core_attention.observing(observe))
            yield

    def record(self, model: Trainable) -> Mapping[str, dict]:
        """{layer from 1: its values} of the layers that have NSA, on every process. Called on all of them."""
        held, phi_names = model.attentions, self._phi_names(model)
        layers, sizes = {}, self.config.model
        for layer, kind in enumerate(sizes.with_mtp(sizes.layer_attentions)):  # one by one: long ones have many blocks
            if kind != "nsa":
                continue
            mine = self._sums(layer, held[layer], phi_names) if layer in held else self._zeros(phi_names)
            total = self.world.sum(torch.cat([part.flatten() for part in mine])).cpu()
            parts = total.split([part.numel() for part in mine])
            layers[str(layer + 1)] = _values(phi_names, *(x.view(y.shape) for x, y in zip(parts, mine, strict=True)))
        return layers

    def _phi_names(self, model: Trainable) -> list[str]:
        """Of any NSA layer: a stage may have none."""
        some = list(model.attentions.values())[:1]
        mine = [sorted(name for name, _ in layer.core_attention.named_parameters()) for layer in some]
        return next((names for held in self.world.gathered(mine) for names in held), [])

    def _zeros(self, phi_names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """gates [4, 3], squares of phi's weights by name, chosen [Hkv of all ranks, blocks]."""
        gates, chosen = self._shapes(self.config.model.num_query_groups)
        return self._zeros_of(gates), self._zeros_of((len(phi_names),)), self._zeros_of(chosen)

    def _zeros_of(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.world.device)

    def _sums(self, layer: int, attention: NSASelfAttention, phi_names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        seen, (_, squares, chosen) = self.seen[layer], self._zeros(phi_names)
        heads = len(seen.chosen)
        first = get_pg_rank(attention.pg_collection.tp) * heads
        chosen[first : first + heads] = seen.chosen
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:  # replicas hold the same weights
            weights = dict(attention.core_attention.named_parameters())
            for i, name in enumerate(phi_names):
                squares[i] = weights[name].detach().double().square().sum()
        return seen.gates, squares, chosen

    def _shapes(self, num_heads: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (4, 3), (num_heads, self.plan.num_blocks)

    def _is_free(self, block_indices: Tensor, own_block: Tensor) -> Tensor:
        nsa = self.config.nsa
        return (block_indices >= nsa.num_init_blocks) & (block_indices <= own_block - nsa.num_local_blocks)


def _values(phi_names: list[str], gates: Tensor, squares: Tensor, chosen: Tensor) -> dict:
    """gates [4, 3], squares by name, chosen [Hkv, blocks]: sums over all ranks."""
    counts, sums, low, high = gates.tolist()
    return {
        "gates": {
            branch: {"mean": sums[i] / counts[i], "low": low[i] / counts[i], "high": high[i] / counts[i]}
            for i, branch in enumerate(BRANCHES)
        },
        "selection_entropy": [entropy(head) for head in chosen],
        "phi_norm": dict(zip(phi_names, squares.sqrt().tolist(), strict=True)),
    }


def entropy(times: Tensor) -> float:
    """Nats, of the distribution that these counts make; 0 where nothing was counted."""
    shares = times[times > 0] / times.sum()
    return float(-(shares * shares.log()).sum())
