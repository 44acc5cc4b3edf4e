"""Norms that need no Transformer Engine and work under sequence parallelism, where Megatron's torch norm does not.

Under `layernorm_zero_centered_gamma` the weight is kept as its difference from one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from nsa_dist.mcore.config import parameter_device


class RMSNorm(torch.nn.RMSNorm):
    """Its weight is marked so that under sequence parallelism Megatron sums the gradient over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=parameter_device(config), dtype=config.params_dtype)
        self.zero_centered = _set_up(self, config)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """As `RMSNorm`, with the mean and a bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=parameter_device(config), dtype=config.params_dtype)
        self.zero_centered = _set_up(self, config)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        return functional.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)


class L2Norm(torch.nn.Module):
    """Megatron's `qk_l2_norm`: as `RMSNorm`, without a weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return functional.rms_norm(wide, x.shape[-1:], None, self.eps).to(x.dtype)


class NormedKeys(torch.nn.ModuleDict):
    """A norm for the keys of each branch; those of pairs [..., Dk + Dv] side by side are normed, values are left."""

    def __init__(self, branches: Sequence[str], norm: Callable[[], torch.nn.Module], dims: tuple[int, int]) -> None:
        super().__init__({branch: norm() for branch in branches})
        self.dims = dims

    def forward(self, kv: Tensor) -> Tensor:
        parts = list(kv.split(list(self.dims) * len(self), -1))
        parts[::2] = [norm(k) for norm, k in zip(self.values(), parts[::2], strict=True)]
        return torch.cat(parts, -1)


def norm_of_heads(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm] | type[L2Norm] | None:
    """Of queries and keys: by `qk_layernorm`, `qk_l2_norm` and the config's `normalization`."""
    if config.qk_l2_norm:
        return L2Norm
    return local_norm(config) if config.qk_layernorm else None


def local_norm(config: TransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The one of the config's `normalization`."""
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def _set_up(norm: torch.nn.RMSNorm | torch.nn.LayerNorm, config: TransformerConfig) -> bool:
    for parameter in norm.parameters():
        vars(parameter)["sequence_parallel"] = config.sequence_parallel
    if config.layernorm_zero_centered_gamma:
        torch.nn.init.zeros_(norm.weight)
    return config.layernorm_zero_centered_gamma
