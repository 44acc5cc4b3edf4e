"""The sizes of a dense model out of the arguments that Megatron-LM trained it with, and what cannot be converted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_dist.rope_scaling import Rotary, scaling_of

_OFF = (False, None)

# What changes the model's function and is not in the names and shapes of its weights: only these values are what NSA
# layers and their MLP compute. An argument that is not there is None: the Megatron-LM that wrote it had no such thing.
ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope", "yarn"),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": _OFF,
    "quick_geglu": _OFF,
    "squared_relu": _OFF,
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": (None,),
    "multi_latent_attention": _OFF,
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": _OFF,
    "softmax_type": ("vanilla", None),
    "softmax_scale": (None,),
    "qk_l2_norm": _OFF,
    "window_size": (None,),
    "rotary_interleaved": _OFF,
    "rope_type": ("rope", None),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "num_experts": (None,),
    "use_mup": _OFF,
    "is_hybrid_model": _OFF,
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "use_legacy_models": _OFF,
    "spec": (None,),
    "yaml_cfg": (None,),
}

# Words of YaRN as Hugging Face has them, Megatron-LM's arguments, and its values where nobody gave one.
_YARN = {
    "factor": ("rotary_scaling_factor", 1.0),
    "original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "beta_fast": ("yarn_beta_fast", 32.0),
    "beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
    "truncate": ("yarn_correction_range_round_to_int", True),
}


def sizes(arguments: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Those fields of a `DenseModel` that the arguments say. ValueError for a model that would not be the same."""
    refuse_others(arguments, place)
    scaling = _scaling(arguments, place)
    try:
        heads = int(arguments["num_attention_heads"])
        found: dict[str, Any] = {
            "num_layers": int(arguments["num_layers"]),
            "hidden_size": int(arguments["hidden_size"]),
            "num_q_heads": heads,
            "num_kv_heads": int(arguments["num_query_groups"]) if arguments["group_query_attention"] else heads,
            "head_dim": int(arguments["kv_channels"]),
            "ffn_hidden_size": int(arguments["ffn_hidden_size"]),
            "vocab_size": int(arguments["padded_vocab_size"]),
            "norm_eps": float(arguments["layernorm_epsilon"]),
            "rotary_base": float(arguments["rotary_base"]),
            "rotary_percent": float(arguments["rotary_percent"]),
            "rope_scaling": scaling,
            "qk_norm": "rms" if arguments.get("qk_layernorm") else None,
            "tie_embeddings": not arguments["untie_embeddings_and_output_weights"],
            "dtype": "bf16" if arguments.get("bf16") else "fp32",
            "sequence_length": int(arguments["seq_length"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the arguments in {place} lack a size or have one that is none ({type(error).__name__}: {error}), without "
            f"which no layer can be built; give a checkpoint that Megatron-LM's own training saved"
        ) from error
    stretch, words = scaling_of(scaling)
    Rotary(found["rotary_base"], found["rotary_percent"], stretch, words).turned(found["head_dim"])
    return found


def refuse_others(arguments: Mapping[str, Any], place: Path) -> None:
    """ValueError for the first argument whose value no NSA model computes."""
    for name, accepted in ONLY.items():
        value = arguments.get(name)
        if value not in accepted:
            raise ValueError(
                f"{place} was trained with {name}={value!r}, but needs {' or '.join(map(repr, accepted))}: the "
                f"converted model would compute something else; give a checkpoint of a model that was trained so"
            )


def _scaling(arguments: Mapping[str, Any], place: Path) -> dict[str, Any] | None:
    """As Hugging Face's words. ValueError for more than one, as positions have one here."""
    found: dict[str, dict[str, Any]] = {}
    if arguments.get("position_embedding_type") == "yarn":
        given = {word: (arguments.get(name), default) for word, (name, default) in _YARN.items()}
        values = {word: default if value is None else value for word, (value, default) in given.items()}
        found["position_embedding_type=yarn"] = {"rope_type": "yarn", **values}
    if arguments.get("use_rope_scaling"):
        numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        factor = arguments.get("rope_scaling_factor", 8.0)
        found["use_rope_scaling"] = {"rope_type": "llama3", "factor": factor, **numbers}
    if (stretch := arguments.get("rotary_seq_len_interpolation_factor")) is not None:
        found["rotary_seq_len_interpolation_factor"] = {"rope_type": "linear", "factor": stretch}
    if len(found) > 1:
        raise ValueError(
            f"{place} was trained with {' and '.join(found)}, but needs one of them at most: positions are scaled in "
            f"one way here; give a checkpoint of a model that was trained so"
        )
    return next(iter(found.values()), None)
