"""A dense run's model as a Llama or a Qwen 3, which is what it is."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from nsa_dist.convert.dense import DenseModel, each_of_mlp, each_of_qkv
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.export.names import plain_config, plain_weights
from nsa_dist.train.export.run import Chosen, choose, config_of, megatron_model
from nsa_dist.train.files.marker import RunMarker
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.refused import Refused

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.proj.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.dense.weight": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def is_dense(run: Path) -> bool:
    """Whether there is a run, and every layer of its model is dense."""
    return RunMarker.read(run) is not None and set(config_of(OutputDir(run)).model.layer_attentions) == {"dense"}


def dense_model(run: Path, step: int | None = None) -> tuple[DenseModel, Chosen]:
    """From the newest intact checkpoint or that of `step`, on the CPU. Nothing of the run is changed.

    Refused as `plain_model`, and where no model of Hugging Face's computes the same.
    """
    chosen = choose(OutputDir(run), step)
    _refuse_others(run, config_of(OutputDir(run)))
    with megatron_model(run, chosen.step) as (config, megatron):
        weights = {name: x.cpu() for name, x in plain_weights(megatron.state_dict()).items()}
    sizes = plain_config(config)
    names = (name for name in DenseModel._fields if name not in ("weights", "not_read"))
    model = DenseModel(**{name: getattr(sizes, name) for name in names}, weights={}, not_read=())
    return model._replace(weights=dict(_named(weights, model))), chosen


def _refuse_others(run: Path, config: TrainConfig) -> None:
    otherwise = {
        "model.qk_norm": (config.model.qk_norm, config.model.qk_norm != "l2"),
        "nsa.rotary_percent": (config.nsa.rotary_percent, config.nsa.rotary_percent == 1),
        "model.num_experts": (config.model.num_experts, not config.model.has_experts),
        "nsa.no_rope_freq": (config.nsa.no_rope_freq, not any(config.no_rope or ())),
    }
    for key, (value, fits) in otherwise.items():
        if not fits:
            raise Refused(
                f"{run} was trained with {key}={value}, and neither a Llama nor a Qwen 3 of Hugging Face's has it, so "
                f"the folder would compute something else; evaluate this run by its metrics.jsonl"
            )


def _named(weights: Mapping[str, Tensor], model: DenseModel) -> Iterator[tuple[str, Tensor]]:
    """By Hugging Face's names, each matrix of its own."""
    for name, x in weights.items():
        if name in _WHOLE:
            if not (model.tie_embeddings and name == "output.weight"):
                yield _WHOLE[name], x
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if rest == "attention.qkv.weight":
            yield from ((f"{prefix}{part}.weight", rows) for part, rows in each_of_qkv(x, model))
        elif rest == "mlp.up.weight":
            yield from ((f"{prefix}{part}.weight", rows) for part, rows in each_of_mlp(x))
        else:
            yield prefix + _OF_LAYER[rest], x
