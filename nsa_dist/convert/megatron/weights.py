"""The weights of a dense GPT of Megatron's by Hugging Face's names.

    decoder.layers.self_attention.linear_qkv.weight     [layers, rows, hidden]: all layers in one tensor, which is what
                                                        Megatron-LM writes of layers that are alike
    decoder.layers.7.self_attention.linear_qkv.weight   [rows, hidden]: a layer by itself

Norms before a projection go by the name that Transformer Engine's fused layers give them, of local layers as well
(`linear_qkv.layer_norm_weight`); their own names are read, too (`input_layernorm.weight`, `pre_mlp_layernorm.weight`).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nsa_dist.convert.dense import DenseModel, each_of_mlp, each_of_qkv, weight_shapes
from nsa_dist.convert.megatron.arguments import sizes
from nsa_dist.convert.megatron.files import Checkpoint, open_checkpoint, read_arguments, read_weights

_FINAL_NORM, _QKV, _FC1 = "decoder.final_layernorm.weight", "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    _FINAL_NORM: "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_OF_LAYER = {"self_attention.linear_proj.weight": "self_attn.o_proj", "mlp.linear_fc2.weight": "mlp.down_proj"}
_NORMS = {
    "input_layernorm.weight": "input_layernorm",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "pre_mlp_layernorm.weight": "post_attention_layernorm",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
}
_QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm",
    "self_attention.k_layernorm.weight": "self_attn.k_norm",
}
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")

# What a checkpoint holds beside the model's weights: patterns of its names, and what it is called when it is said.
_NOT_TAKEN = {
    r"(chained_\d+\.)?optimizer\..*": "state of the optimizer",
    r"(rng_state|rerun_state_machine_state|common_state)/.*": "state of the run",
    r".*\._extra_state(/.*)?": "extra state of layers (fp8)",
    r"mtp\..*": "layers of multi-token prediction",
}


def read_megatron(folder: Path, tokenizer: str, end_of_document: int) -> DenseModel:
    """The model of a `torch_dist` checkpoint: one iteration's folder, or the latest in what `--save` named.

    ValueError for what is missing, cut or of another format, for models whose function NSA layers do not have, and for
    tensors that have no place. Padded rows of the vocabulary are kept: they are in the dense model's softmax, too.
    """
    checkpoint = open_checkpoint(folder)
    arguments = read_arguments(checkpoint)
    read = sizes(arguments, checkpoint.folder)
    not_taken = {name: _not_taken(name) for name in checkpoint.metadata.state_dict_metadata}
    dense = DenseModel(
        **read,
        end_of_document=end_of_document,
        tokenizer=tokenizer,
        weights={},
        not_read=tuple(sorted({kind for kind in not_taken.values() if kind})),
    )
    names = [name for name, kind in not_taken.items() if not kind]
    _check(dense, {name: _shape(checkpoint, name) for name in names}, checkpoint.folder)
    found = read_weights(checkpoint, names)
    around_zero = any(arguments.get(name) for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p"))
    centre = 1 if around_zero else 0  # the second name is of older checkpoints
    return dense._replace(weights={ours: x for name in names for ours, x in _named(name, found[name], dense, centre)})


def _not_taken(name: str) -> str | None:
    return next((kind for pattern, kind in _NOT_TAKEN.items() if re.fullmatch(pattern, name)), None)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Empty for what is no tensor."""
    return tuple(checkpoint.tensors[name].size) if name in checkpoint.tensors else ()


def _check(dense: DenseModel, given: Mapping[str, tuple[int, ...]], place: Path) -> None:
    """Every weight of the model is there once, of its size, and nothing else."""
    allowed = _allowed(dense)
    wrong = {name: f"{name} {list(shape)}" for name, shape in given.items() if allowed.get(name) != shape}
    if not wrong:
        named = [each for name in given for each, _ in _named(name, torch.empty(given[name], device="meta"), dense, 0)]
        needed = weight_shapes(dense).keys()
        twice = [name for name, count in Counter(named).items() if count > 1]
        wrong = {name: f"{name} missing" for name in sorted(needed - set(named))}
        wrong |= {name: f"{name} twice" for name in twice}
    if wrong:
        shown = ", ".join(list(wrong.values())[:3])
        raise ValueError(
            f"{place} has {shown}{' and others' if len(wrong) > 3 else ''}, which is not what its arguments describe: "
            f"a weight that has no place would be lost, and one that is missing unknown; give a checkpoint of a GPT of "
            f"dense layers with RMSNorm, gated MLPs and no biases, as Megatron-LM saved it"
        )


def _allowed(dense: DenseModel) -> dict[str, tuple[int, ...]]:
    """Each name that may be there, with its shape."""
    hidden, dim = dense.hidden_size, dense.head_dim
    q, kv = dense.num_q_heads * dim, dense.num_kv_heads * dim
    of_layer: dict[str, tuple[int, ...]] = {
        _QKV: (q + 2 * kv, hidden), "self_attention.linear_proj.weight": (hidden, q),
        _FC1: (2 * dense.ffn_hidden_size, hidden), "mlp.linear_fc2.weight": (hidden, dense.ffn_hidden_size),
    }  # fmt: skip
    of_layer |= dict.fromkeys(_NORMS, (hidden,))
    if dense.qk_norm:
        of_layer |= dict.fromkeys(_QK_NORMS, (dim,))
    rows = (dense.vocab_size, hidden)
    found = {"embedding.word_embeddings.weight": rows, "decoder.final_layernorm.weight": (hidden,)}
    if not dense.tie_embeddings:
        found["output_layer.weight"] = rows
    for name, shape in of_layer.items():
        found[f"decoder.layers.{name}"] = (dense.num_layers, *shape)
        found |= {f"decoder.layers.{layer}.{name}": shape for layer in range(dense.num_layers)}
    return found


def _named(name: str, x: Tensor, dense: DenseModel, centre: int) -> Iterator[tuple[str, Tensor]]:
    """By Hugging Face's names, each matrix of its own; `centre` is added to the weights of norms."""
    if name in _WHOLE:
        yield _WHOLE[name], _around(x, centre) if name == _FINAL_NORM else x
        return
    found = _LAYER.fullmatch(name)
    assert found is not None
    number, rest = found.groups()
    for layer, weight in [(int(number), x)] if number else enumerate(x.unbind()):
        for part, each in _parts(rest, weight, dense, centre):
            yield f"model.layers.{layer}.{part}.weight", each


def _parts(rest: str, x: Tensor, dense: DenseModel, centre: int) -> Iterator[tuple[str, Tensor]]:
    if rest == _QKV:
        yield from each_of_qkv(x, dense)
    elif rest == _FC1:
        yield from each_of_mlp(x)
    else:
        norms = _NORMS | _QK_NORMS
        yield (norms[rest], _around(x, centre)) if rest in norms else (_OF_LAYER[rest], x)


def _around(x: Tensor, centre: int) -> Tensor:
    return (x.float() + centre).to(x.dtype) if centre else x
