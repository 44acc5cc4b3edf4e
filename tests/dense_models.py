"""Small dense models in folders as Hugging Face writes them, and their logits from the mathematics alone."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_dist.inference.tensors import write_tensors

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 256, "rms_norm_eps": 1e-5, "rope_theta": 5e4,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "eos_token_id": [7, 9], "torch_dtype": "float32", "initializer_range": 0.02,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "vocab_size": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "use_sliding_window": False, "eos_token_id": 3, "torch_dtype": "float32",
}  # fmt: skip


def head_dim(config: dict) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def drawn(config: dict) -> dict[str, Tensor]:
    """Weights by Hugging Face's names; norms around one, attention sharp enough to tell tokens apart."""
    torch.manual_seed(5)
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], head_dim(config)
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * 1.5 / columns**0.5

    def norm(width: int) -> Tensor:
        return 1 + torch.randn(width) / 4

    embedding = torch.randn(config["vocab_size"], hidden) * 0.4  # so that tied logits are as large as a model's
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(hidden), "post_attention_layernorm": norm(hidden),
            "self_attn.q_proj": matrix(q, hidden), "self_attn.k_proj": matrix(kv, hidden),
            "self_attn.v_proj": matrix(kv, hidden), "self_attn.o_proj": matrix(hidden, q),
            "mlp.gate_proj": matrix(ffn, hidden), "mlp.up_proj": matrix(ffn, hidden),
            "mlp.down_proj": matrix(hidden, ffn),
        }  # fmt: skip
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": norm(dim), "self_attn.k_norm": norm(dim)}
        weights |= {f"model.layers.{i}.{name}.weight": x for name, x in layer.items()}
    return weights


def write_folder(folder: Path, config: dict, weights: dict[str, Tensor], files: int = 1) -> Path:
    """`files` of weights, with an index if there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    place = {name: names[i % files] for i, name in enumerate(sorted(weights))}
    for file in names:
        write_tensors(folder / file, {name: x for name, x in weights.items() if place[name] == file})
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


def logits(config: dict, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """[T] -> [T, vocab], in fp64."""
    w = {name: x.double() for name, x in weights.items()}
    heads, groups, dim, eps = (
        config["num_attention_heads"], config["num_key_value_heads"], head_dim(config), config["rms_norm_eps"]
    )  # fmt: skip

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:  # [T, H, D]
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(_thetas(config)).double()
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    later = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = ((h @ w[f"{layer}.self_attn.{n}_proj.weight"].T).view(len(x), -1, dim) for n in "qkv")
        if config["model_type"] == "qwen3":
            q, k = norm(q, f"{layer}.self_attn.q_norm"), norm(k, f"{layer}.self_attn.k_norm")
        q, k = turned(q), turned(k)
        out = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head * groups // heads].T / dim**0.5
            out.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[:, head * groups // heads])
        x = x + torch.cat(out, -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (h @ w[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
    output = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm") @ output.T


def _thetas(config: dict) -> list[float]:
    dim, scaling = head_dim(config), config["rope_scaling"]
    thetas = [config["rope_theta"] ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling is None:
        return thetas
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    found = []
    for theta in thetas:
        turns = length * theta / (2 * math.pi)
        share = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        share = min(max(share, 0), 1)
        found.append(share * theta + (1 - share) * theta / factor)
    return found
