"""A dense model as a folder that Hugging Face and `read_dense` read: a Llama, or a Qwen 3 with its norms of queries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_dist.convert.dense import DenseModel
from nsa_dist.inference.folder import CONFIG, WEIGHTS, write_tokenizer
from nsa_dist.inference.tensors import write_tensors

_KINDS = {None: ("llama", "LlamaForCausalLM"), "rms": ("qwen3", "Qwen3ForCausalLM")}


def write_dense(dense: DenseModel, folder: Path, tokenizer: Mapping[str, bytes] | None = None) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer's files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, dense.weights, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_sizes(dense), indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, dense.tokenizer, tokenizer)


def _sizes(dense: DenseModel) -> dict[str, Any]:
    kind, architecture = _KINDS[dense.qk_norm]
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": dense.num_layers,
        "num_attention_heads": dense.num_q_heads,
        "num_key_value_heads": dense.num_kv_heads,
        "head_dim": dense.head_dim,
        "intermediate_size": dense.ffn_hidden_size,
        "vocab_size": dense.vocab_size,
        "max_position_embeddings": dense.sequence_length,
        "rms_norm_eps": dense.norm_eps,
        "rope_theta": dense.rotary_base,
        "rope_scaling": dense.rope_scaling,
        "tie_word_embeddings": dense.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": dense.end_of_document,
        "bos_token_id": None,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dense.dtype],
        "tokenizer": dense.tokenizer,  # read_dense's: what a row of the embedding stands for
    }
