"""Megatron's transformer configuration with the fields of Native Sparse Attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nsa_dist.config import NSAConfig, layer_attentions
from nsa_dist.cp.options import FetchOptions
from nsa_dist.mcore.settings import refuse_settings
from nsa_dist.rope_scaling import Llama3Scaling, Rotary, YarnScaling


@dataclass
class NSATransformerConfig(TransformerConfig):
    """A `TransformerConfig` whose attention is NSA. ValueError for settings the layer does not have (`settings.py`).

    `nsa_attention` makes some or all layers dense instead (`dense.py`): one word for all layers, or a list that repeats
    until the layers end. Dense layers need `context_parallel_size` 1, and a model of both kinds `nsa_block_spec`.

    Head dims: q and k take `kv_channels`, v takes `nsa_v_head_dim` (None: the same).
    Positions: the layer turns q and k itself, at the positions of the context-parallel plan, so the model around it
    wants `position_embedding_type="none"`. Learned positions are refused when the model draws them, a `rotary_pos_emb`
    of another base or scaling when the layer is called. Base, percent, interpolation, Llama 3's scaling, YaRN (given
    its `yarn_rotary_scaling_factor`) and layers without positions (`no_rope_freq`) are said by Megatron's own names.
    Norms of q and k: `qk_layernorm` has one of q and one for the keys of each branch, by `normalization`, before they
    are compressed or turned; `qk_l2_norm` is the same without weights.
    """

    nsa: NSAConfig = field(default_factory=NSAConfig)
    nsa_attention: str | Sequence[str] = "nsa"  # or "dense", or a list of both: see nsa_dist.config.layer_attentions
    nsa_shared_kv: bool = False  # one K/V for the three branches instead of one each
    nsa_compression: Literal["mlp", "mean"] = "mlp"
    nsa_compress_before_rope: bool = True  # and turn the compressed key at its block's first position
    nsa_rotary_base: float = 10_000.0
    nsa_rope_scaling: Llama3Scaling | YarnScaling | None = None  # any, where Megatron's own names do not reach
    nsa_gate_bias: bool = False  # added to the gates' logits: one number a head and branch, 0 at first
    nsa_layout: Literal["zigzag", "contiguous"] = "zigzag"  # which tokens a context-parallel rank was given
    nsa_pack_order: Literal["sequence", "documents"] | None = None  # the same for packs: see packs.pack_order
    nsa_v_head_dim: int | None = None
    nsa_fetch: FetchOptions = field(default_factory=FetchOptions)  # how selected blocks of other ranks travel

    # Arguments of Megatron-LM under their own names, so that core_transformer_config_from_args copies them here.
    dataloader_inter_document_masking: bool = False
    sft: bool = False
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    rotary_base: float = 10_000
    rotary_percent: float = 1.0
    rotary_seq_len_interpolation_factor: float | None = None
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0

    # What GPTModel reads of its configuration for position_embedding_type="yarn". A factor of 1 is no YaRN.
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True

    def __post_init__(self) -> None:
        refuse_settings(self)
        self._check_offloading()
        self._check_recipe()
        super().__post_init__()
        self._check_choices()
        self.rotary.turned(self.kv_channels)
        self._check_groups()
        self._check_dense()
        draw = vars(self)["embedding_init_method"]
        self.embedding_init_method = draw if isinstance(draw, _TokenEmbeddingInit) else _TokenEmbeddingInit(draw)

    @property
    def v_head_dim(self) -> int:
        return self.nsa_v_head_dim or self.kv_channels

    @property
    def layer_attentions(self) -> tuple[str, ...]:
        """ "nsa" or "dense" for every layer of the model."""
        return layer_attentions(self.nsa_attention, self.num_layers)

    @property
    def rotary(self) -> Rotary:
        """How layers that have positions turn queries and keys."""
        scaling = self.nsa_rope_scaling
        if self.yarn_rotary_scaling_factor != 1:
            scaling = YarnScaling(
                self.yarn_rotary_scaling_factor,
                self.yarn_original_max_position_embeddings,
                self.yarn_beta_fast,
                self.yarn_beta_slow,
                self.yarn_mscale,
                self.yarn_mscale_all_dim,
                self.yarn_correction_range_round_to_int,
            )
        elif self.use_rope_scaling:
            scaling = Llama3Scaling(self.rope_scaling_factor)
        stretch = self.rotary_seq_len_interpolation_factor or 1.0
        return Rotary(self.nsa_rotary_base, self.rotary_percent, stretch, scaling)

    def rotary_of(self, layer_number: int) -> Rotary:
        """That of a layer, counted from 1; `no_rope_freq` has 1 for those without positions.

        Layers of multi-token prediction, which come behind those that it counts, have positions.
        """
        has_none = [] if self.no_rope_freq is None else list(self.no_rope_freq)  # Megatron made a list of a number
        here = has_none[layer_number - 1 : layer_number]
        return replace(self.rotary, percent=0.0) if any(here) else self.rotary

    def _check_recipe(self) -> None:
        """Settings that exclude each other, and `no_rope_freq`, about which Megatron has a bare assertion."""
        pairs = (
            ("qk_layernorm", "qk_l2_norm", "are two norms of the same queries and keys"),
            ("use_rope_scaling", "yarn_rotary_scaling_factor", "are two scalings of the same frequencies"),
            ("use_rope_scaling", "nsa_rope_scaling", "are two scalings of the same frequencies"),
            ("yarn_rotary_scaling_factor", "nsa_rope_scaling", "are two scalings of the same frequencies"),
            ("add_qkv_bias", "nsa_gate_bias", "are two biases of the gates, whose logits linear_qkv projects"),
            ("add_bias_linear", "nsa_gate_bias", "are two biases of the gates, whose logits linear_qkv projects"),
        )
        for first, second, why in pairs:
            given = {name: getattr(self, name) for name in (first, second)}
            if all(given.values()) and given.get("yarn_rotary_scaling_factor") != 1:
                raise ValueError(
                    f"{first}={given[first]} and {second}={given[second]} {why}, and one would be useless; turn one of "
                    f"them off"
                )
        freq, layers = self.no_rope_freq, self.num_layers
        if freq and (layers % freq if isinstance(freq, int) else len(freq) != layers):
            raise ValueError(
                f"no_rope_freq={freq} must be a divisor of num_layers={layers}, every so many of them having no "
                f"positions, or a list that says 0 or 1 for each layer; give {layers} numbers"
            )

    def _check_dense(self) -> None:
        if "dense" in self.layer_attentions and self.context_parallel_size > 1:
            raise ValueError(
                f"nsa_attention={self.nsa_attention!r} has dense layers and context_parallel_size="
                f"{self.context_parallel_size}, but a dense layer needs all keys on every rank, which it does not "
                f"gather; set context_parallel_size=1, or nsa_attention='nsa'"
            )

    def _check_choices(self) -> None:
        choices: dict[str, tuple] = {
            "nsa_compression": ("mlp", "mean"),
            "nsa_layout": ("zigzag", "contiguous"),
            "nsa_pack_order": (None, "sequence", "documents"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}; choose one")
        if not isinstance(self.nsa, NSAConfig):
            raise ValueError(
                f"nsa={self.nsa!r} must be an nsa_dist.NSAConfig, which checks its sizes; pass "
                f"nsa=NSAConfig(num_slc_blocks=..., window_len=...)"
            )
        if not isinstance(self.nsa_fetch, FetchOptions):
            raise ValueError(
                f"nsa_fetch={self.nsa_fetch!r} must be an nsa_dist.cp.options.FetchOptions, which checks its values; "
                f"pass nsa_fetch=FetchOptions(kv_fetch_budget_bytes=..., keep_pages=...)"
            )
        self.nsa_fetch.domain_of(self.context_parallel_size)

        if self.rotary_base not in (10_000, self.nsa_rotary_base):  # 10,000 is what Megatron-LM says if nobody does
            raise ValueError(
                f"rotary_base={self.rotary_base} is not what turns queries and keys here: that is nsa_rotary_base="
                f"{self.nsa_rotary_base}; set nsa_rotary_base={self.rotary_base}, or leave rotary_base out"
            )

    def _check_offloading(self) -> None:
        """Megatron's layer offloads what is not attention itself; what is, only its own attention would."""
        asked = {"core_attn", "qkv_linear", "attn_proj"}.intersection(self.offload_modules or [])
        if self.fine_grained_activation_offloading and asked:
            names = sorted(asked)
            raise ValueError(
                f"offload_modules={self.offload_modules} has {', '.join(names)}, but NSA's attention keeps what it "
                f"saves on its device; take {', '.join(names)} out of offload_modules, or recompute the attention "
                f"with recompute_granularity='selective' and recompute_modules=['core_attn']"
            )

    def _check_groups(self) -> None:
        groups, tensor = self.num_query_groups, self.tensor_model_parallel_size
        if groups % tensor:
            raise ValueError(
                f"num_query_groups={groups} must be a multiple of tensor_model_parallel_size={tensor}, because a "
                f"key/value head with its blocks is never split; take num_query_groups="
                f"{-(-groups // tensor) * tensor} or a smaller tensor_model_parallel_size"
            )


def need_nsa_config(config: TransformerConfig, who: str) -> None:
    """ValueError for a config without the sizes of the branches."""
    if not isinstance(config, NSATransformerConfig):
        raise ValueError(
            f"{who} was given a {type(config).__name__}, but needs an NSATransformerConfig, which holds the sizes of "
            f"the three branches; build the model's config from nsa_dist.mcore.NSATransformerConfig"
        )


class _TokenEmbeddingInit:
    """Draws the token embedding, and refuses to draw learned positions.

    A model calls it for both; only the token embedding is cut over tensor-parallel ranks, and marked as such or still a
    plain tensor when it is drawn. Without `perform_initialization` a model calls it for neither.
    """

    def __init__(self, draw: Callable[[torch.Tensor], Any]) -> None:
        self.draw = draw

    def __call__(self, weight: torch.Tensor) -> Any:
        if isinstance(weight, torch.nn.Parameter) and not hasattr(weight, "tensor_model_parallel"):
            raise ValueError(
                f"the model adds a learned embedding of shape {tuple(weight.shape)} to its tokens "
                f"(position_embedding_type='learned_absolute', GPTModel's default), but NSA layers turn queries and "
                f"keys by their positions themselves; pass position_embedding_type='none' to the model"
            )
        return self.draw(weight)


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron wants new parameters: the CPU if it initialises there, else the current CUDA device."""
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.empty(0, device=torch.cuda.current_device()).device
