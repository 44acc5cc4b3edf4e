"""Megatron's transformer configuration with the fields of Native Sparse Attention."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nsa_dist.config import NSAConfig
from nsa_dist.cp.fetch import FetchOptions

# Fields of TransformerConfig that change attention in ways this layer does not have: the one value it accepts.
_UNSUPPORTED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "fused_single_qkv_rope": False,
    "multi_latent_attention": False,
    "qk_clip": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "window_size": None,
}


@dataclass
class NSATransformerConfig(TransformerConfig):
    """A `TransformerConfig` whose attention is NSA. ValueError for combinations the layer does not have.

    Head dims: q and k take `kv_channels`, v takes `nsa_v_head_dim` (None: the same).
    Positions: the layer turns q and k itself, at the positions of the context-parallel plan, so the model around it
    wants `position_embedding_type="none"`; a `rotary_pos_emb` that a model passes all the same is not used.
    """

    nsa: NSAConfig = field(default_factory=NSAConfig)
    nsa_shared_kv: bool = False  # one K/V for the three branches instead of one each
    nsa_compression: Literal["mlp", "mean"] = "mlp"
    nsa_compress_before_rope: bool = True  # and turn the compressed key at its block's first position
    nsa_rotary_base: float = 10_000.0
    nsa_layout: Literal["zigzag", "contiguous"] = "zigzag"  # which tokens a context-parallel rank was given
    nsa_pack_order: Literal["sequence", "documents"] | None = None  # the same for packs: see packs.pack_order
    nsa_v_head_dim: int | None = None
    nsa_fetch: FetchOptions = field(default_factory=FetchOptions)  # how selected blocks of other ranks travel

    # Arguments of Megatron-LM under their own names, so that core_transformer_config_from_args copies them here.
    dataloader_inter_document_masking: bool = False
    sft: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        self._check_groups()
        for name, accepted in _UNSUPPORTED.items():
            given = getattr(self, name, accepted)
            if given != accepted:
                raise ValueError(
                    f"{name}={given!r} is not part of Native Sparse Attention as this layer computes it; "
                    f"set {name}={accepted!r}, or use Megatron's own attention in that layer"
                )

    @property
    def v_head_dim(self) -> int:
        return self.nsa_v_head_dim or self.kv_channels

    def _check_choices(self) -> None:
        choices = {"nsa_compression": ("mlp", "mean"), "nsa_layout": ("zigzag", "contiguous")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}; choose one")
        if not isinstance(self.nsa_fetch, FetchOptions):
            raise ValueError(
                f"nsa_fetch={self.nsa_fetch!r} must be an nsa_dist.cp.fetch.FetchOptions, which checks its values; "
                f"pass nsa_fetch=FetchOptions(kv_fetch_budget_bytes=..., keep_pages=...)"
            )

    def _check_groups(self) -> None:
        groups, tensor = self.num_query_groups, self.tensor_model_parallel_size
        if groups % tensor:
            raise ValueError(
                f"num_query_groups={groups} must be a multiple of tensor_model_parallel_size={tensor}, because a "
                f"key/value head with its blocks is never split; take num_query_groups="
                f"{-(-groups // tensor) * tensor} or a smaller tensor_model_parallel_size"
            )


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron wants new parameters: the CPU if it initialises there, else the current CUDA device."""
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.empty(0, device=torch.cuda.current_device()).device
