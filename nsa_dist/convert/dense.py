"""A dense Llama or Qwen 3 in a folder as Hugging Face writes them: `config.json` and `*.safetensors`."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nsa_dist.inference.tensors import read_tensors
from nsa_dist.rope_scaling import scaling_of

# What a model of these kinds may say, but for sizes: only these values are what NSA layers and their MLP compute.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
_SIZES = {
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "tie_word_embeddings", "eos_token_id", "torch_dtype", "dtype", "layer_types", "tokenizer",
    "max_position_embeddings",
}  # fmt: skip
_KINDS = {"llama": None, "qwen3": "rms"}  # and the norm of their queries and keys


class DenseModel(NamedTuple):
    """What was read. `rope_scaling` has Hugging Face's words, `weights` its names."""

    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float
    rotary_base: float
    rotary_percent: float
    rope_scaling: dict[str, Any] | None
    qk_norm: str | None
    tie_embeddings: bool
    end_of_document: int
    dtype: str
    tokenizer: str  # "huggingface", or "bytes" if the folder says so: a row of the embedding is a byte
    sequence_length: int | None  # the longest that it was trained on
    weights: dict[str, Tensor]
    not_read: tuple[str, ...]  # what was there, says nothing of what is computed as far as is known, and was left


def read_dense(folder: Path) -> DenseModel:
    """ValueError for files that are missing or cut, for models of other kinds, and for weights they do not have."""
    raw = _config(folder)
    read = _sizes(raw, folder / "config.json")
    found = _weights(folder)
    dense = DenseModel(**read, weights=found, not_read=tuple(sorted(raw.keys() - _SIZES - _ONLY.keys())))
    expected = weight_shapes(dense)
    given = {name: tuple(x.shape) for name, x in found.items()}
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if wrong:
        shown = ", ".join(f"{name} {list(given.get(name, ())) or 'missing'}" for name in wrong[:3])
        raise ValueError(
            f"{folder} has {shown}{' and others' if len(wrong) > 3 else ''}, which is not what a {raw['model_type']} "
            f"of its config.json has: a weight that has no place would be lost (biases of q, k and v, as Qwen 2.5 has "
            f"them, have none); give a folder of a llama or qwen3 without biases"
        )
    return dense


def _config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / 'config.json'} cannot be read ({error}), and it has the sizes of the model; give a folder as "
            f"Hugging Face has it, with config.json and *.safetensors, or a torch_dist checkpoint of Megatron-LM"
        ) from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in _KINDS:
        raise ValueError(
            f"{folder / 'config.json'} has model_type={kind!r}, but needs one of {', '.join(_KINDS)}: others have "
            f"other layers (qwen2 has biases of q, k and v); give a folder of one of these"
        )
    for name, accepted in _ONLY.items():
        if raw.get(name) not in accepted:
            raise ValueError(
                f"{folder / 'config.json'} has {name}={raw[name]!r}, but needs {accepted[0]!r}: the converted model "
                f"would compute something else; give a folder of a model without it"
            )
    if set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"{folder / 'config.json'} has layer_types={raw['layer_types']}, but all need to be full_attention, which "
            f"NSA computes while all blocks are selected; give a folder of a model without others"
        )
    return raw


def _sizes(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    words = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {name: words[name] for name in words if name != "rope_theta"} or None
    scaling_of(scaling)
    end = raw.get("eos_token_id")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    try:
        return {
            "num_layers": int(raw["num_hidden_layers"]),
            "hidden_size": int(raw["hidden_size"]),
            "num_q_heads": int(raw["num_attention_heads"]),
            "num_kv_heads": int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
            "head_dim": int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]),
            "ffn_hidden_size": int(raw["intermediate_size"]),
            "vocab_size": int(raw["vocab_size"]),
            "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
            "rotary_base": float(raw.get("rope_theta") or words.get("rope_theta") or 10_000.0),
            "rotary_percent": float(raw.get("partial_rotary_factor") or 1.0),
            "rope_scaling": scaling,
            "qk_norm": _KINDS[raw["model_type"]],
            "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
            "end_of_document": int((end[0] if isinstance(end, list) else end) or 0),
            "dtype": "bf16" if "bfloat16" in dtype else "fp32",
            "tokenizer": "bytes" if raw.get("tokenizer") == "bytes" else "huggingface",
            "sequence_length": raw.get("max_position_embeddings"),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} lacks a size or has one that is none ({type(error).__name__}: {error}), without which no layer "
            f"can be built; give a folder as Hugging Face has it"
        ) from error


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    if not files or not all(file.is_file() for file in files):
        missing = next((file.name for file in files if not file.is_file()), "*.safetensors")
        raise ValueError(f"{folder} has no {missing}, and the weights are in it; download the folder as a whole")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_tensors(file)
    return {name: x for name, x in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def weight_shapes(dense: DenseModel) -> dict[str, tuple[int, ...]]:
    hidden, ffn, dim = dense.hidden_size, dense.ffn_hidden_size, dense.head_dim
    q, kv = dense.num_q_heads * dim, dense.num_kv_heads * dim
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    if dense.qk_norm:
        of_layer |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (dense.vocab_size, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    if not dense.tie_embeddings or "lm_head.weight" in dense.weights:
        shapes["lm_head.weight"] = (dense.vocab_size, hidden)
    for layer in range(dense.num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def each_of_qkv(weight: Tensor, dense: DenseModel) -> Iterator[tuple[str, Tensor]]:
    """Out of Megatron's linear_qkv, whose rows are of each key/value head [ q of its query heads | k | v ]."""
    widths = [dense.num_q_heads // dense.num_kv_heads * dense.head_dim, dense.head_dim, dense.head_dim]
    parts = weight.unflatten(0, (dense.num_kv_heads, -1)).split(widths, 1)
    for part, of_heads in zip("qkv", parts, strict=True):
        yield f"self_attn.{part}_proj", of_heads.flatten(0, 1).contiguous()


def each_of_mlp(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Out of Megatron's linear_fc1, whose rows are [ gate | up ]."""
    for part, rows in zip(("gate", "up"), weight.chunk(2), strict=True):
        yield f"mlp.{part}_proj", rows.contiguous()
