"""What an NSA layer learns beside its projections, sharded by head over tensor-parallel ranks: phi, the gates' bias."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from nsa_dist.compress import CompressMLP, TurnedCompressMLP
from nsa_dist.mcore.config import NSATransformerConfig, parameter_device
from nsa_dist.rope_scaling import Rotary


class _ByHead(torch.nn.Module):
    """Every parameter has the head as its first axis, which tensor parallelism cuts."""

    tp_group: Any

    def _mark(self, tp_group: Any) -> None:
        self.tp_group = tp_group
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's checkpoint entries: the head axis is cut over tensor-parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True)  # optimizers find their state by parameter identity
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            dict.fromkeys(state, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class GateBias(_ByHead):
    """`bias` [Hq * 3] of this rank's query heads, branches side by side in a head, 0 at first."""

    def __init__(self, config: NSATransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        local = config.num_attention_heads // get_pg_size(pg_collection.tp)
        where = {"device": parameter_device(config), "dtype": config.params_dtype}
        self.bias = torch.nn.Parameter(torch.zeros(3 * local, **where))
        self._mark(pg_collection.tp)

    def forward(self, logits: Tensor) -> Tensor:
        """[T, Hq, 3] -> the same, with the bias."""
        return logits + self.bias.view(-1, 3)


class ParallelCompressMLP(TurnedCompressMLP, _ByHead):
    """`TurnedCompressMLP` of this tensor-parallel rank's heads.

    Every parameter has the head as its first axis, so tensor parallelism cuts axis 0 and nothing is replicated: no
    gradient needs a sum over tensor-parallel ranks. On a CPU every rank draws the whole model's values and keeps its
    own, so that initial values do not depend on the tensor-parallel size.
    """

    def __init__(
        self,
        config: NSATransformerConfig,
        head_dim: int,
        pg_collection: ProcessGroupCollection,
        rotary: Rotary | None = None,
    ) -> None:
        local_heads = config.num_query_groups // get_pg_size(pg_collection.tp)
        sizes = (head_dim, config.nsa.cmp_block_len, None, parameter_device(config), config.params_dtype)
        if config.use_cpu_initialization:
            with torch.random.fork_rng(devices=[]):  # what the local heads draw is thrown away
                super().__init__(local_heads, *sizes, rotary=rotary)
            self._take_heads(CompressMLP(config.num_query_groups, *sizes), get_pg_rank(pg_collection.tp))
        else:
            with get_cuda_rng_tracker().fork():
                super().__init__(local_heads, *sizes, rotary=rotary)
        self._mark(pg_collection.tp)

    @torch.no_grad()
    def _take_heads(self, whole: CompressMLP, tp_rank: int) -> None:
        for mine, all_heads in zip(self.parameters(), whole.parameters(), strict=True):
            heads = mine.shape[0]
            mine.copy_(all_heads[tp_rank * heads : (tp_rank + 1) * heads])
