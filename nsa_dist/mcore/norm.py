"""An RMSNorm that needs no Transformer Engine and works under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nsa_dist.mcore.config import parameter_device


class RMSNorm(torch.nn.RMSNorm):
    """Its weight is marked so that under sequence parallelism Megatron sums the gradient over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=parameter_device(config), dtype=config.params_dtype)
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
