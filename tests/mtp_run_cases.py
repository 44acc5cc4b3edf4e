"""Runs that predict more than the next token: importable, because spawned processes find their work by name."""

import shutil
from pathlib import Path
from unittest.mock import patch

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nsa_dist.train import loop
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.model import bare_model
from nsa_dist.train.mtp.gpt import inner_layer, layers_of
from nsa_dist.train.world import entered
from train_cases import FORK_STEP, StopAfter, copied, run, small_config

STEPS = FORK_STEP + 20
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.05, "moe_layer_freq": [0, 1]}
# At these factors no choice of blocks is so near that rounding decides: docs/decisions/multi-token-prediction.md
MODELS: dict[str, dict] = {
    "one": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.2},
    "two, tied": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.2, "tie_embeddings": True},
    "packed": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3},
    "experts": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.2, **EXPERTS},
    "hybrid": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.2, "attention": ["nsa", "dense"]},
}
_TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict] = {
    "CP2": {"parallel": {"context_parallel_size": 2}},
    "CP2 contiguous": {"parallel": {"context_parallel_size": 2, "layout": "contiguous"}},
    "CP2 by documents": {"parallel": {"context_parallel_size": 2, "pack_order": "documents"}},
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "TP2 SP": {"parallel": _TENSOR},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "DP2": {},
    "DP2 in four": {"run": {"micro_batch_size": 1}},
    "CP4": {"parallel": {"context_parallel_size": 4}},
    "TP2 SP, CP2": {"parallel": {**_TENSOR, "context_parallel_size": 2}},
    "PP2, CP2": {"parallel": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}},
}
OF_FOUR = ("CP4", "TP2 SP, CP2", "PP2, CP2")
RUNS = [
    *(("one", layout) for layout in LAYOUTS if layout != "CP2 by documents"),
    *(("two, tied", layout) for layout in ("CP2", "TP2 SP", "PP2")),
    *(("packed", layout) for layout in ("CP2", "CP2 contiguous", "CP2 by documents", "PP2", "DP2 in four", "CP4")),
    *(("experts", layout) for layout in ("CP2", "TP2 SP", "PP2")),
    *(("hybrid", layout) for layout in ("TP2 SP", "PP2")),
]
BACK = [("one", "TP2 SP"), ("two, tied", "PP2")]  # and back to one process

STARTS: dict[str, tuple[str, dict, list[bool]]] = {  # what they start from, sections, which layers have learnt
    "two from one": ("one", {"model": {"mtp_num_layers": 2}, **LAYOUTS["CP2"]}, [True, False]),
    "two from one, stages": ("one", {"model": {"mtp_num_layers": 2}, **LAYOUTS["PP2"]}, [True, False]),
    "one from a folder": ("one.folder", LAYOUTS["PP2"], [False]),
    "none from one": ("one", {"model": {"mtp_num_layers": None, "mtp_loss_scaling_factor": 0.1}}, []),
}


def config(base: Path, folder: str, name: str, **sections: dict) -> TrainConfig:
    lengths = {
        "steps": STEPS, "eval_interval": STEPS, "checkpoint_interval": STEPS, "replica_check_interval": STEPS // 2,
        "health_interval": STEPS, **sections.pop("run", {}),
    }  # fmt: skip
    model = {**MODELS[name], **sections.pop("model", {})}
    data = {"documents": "packed"} if name == "packed" else {}
    sections.setdefault("optimizer", {"adam_eps": 2e-5})  # docs/decisions/tiny-job.md: at 1e-8 rounding moves weights
    return small_config(base, folder, model=model, run=lengths, data=data, **sections)


def alone(rank: int, base: Path) -> None:
    """Each model to the end by one process, which stopped on the way; one whose layers ahead weigh nothing."""
    for name in MODELS:
        run(config(base, f"{name} fork", name), StopAfter(FORK_STEP))
        shutil.copytree(base / f"{name} fork", base / name)
        run(config(base, name, name).resuming())
    run(config(base, "of no weight", "one", model={"mtp_loss_scaling_factor": 0.0}))


def over_ranks(rank: int, base: Path, runs: list[tuple[str, str]]) -> None:
    """The forks to the end, each in its layout."""
    with patch.object(loop, "plot_losses"), patch.object(loop, "plot_selection"):
        for name, layout in runs:
            folder = f"{name} {layout}"
            copied(rank, base / f"{name} fork", base / folder)
            run(config(base, folder, name, **LAYOUTS[layout]).resuming())


def halfway(rank: int, base: Path) -> None:
    """The forks on for some steps, each in its layout."""
    for name, layout in BACK:
        folder = f"{name} {layout} and back"
        copied(rank, base / f"{name} fork", base / folder)
        run(config(base, folder, name, **LAYOUTS[layout]).resuming(), StopAfter(10))


def back(rank: int, base: Path) -> None:
    """Those to the end, by one process."""
    for name, layout in BACK:
        run(config(base, f"{name} {layout} and back", name).resuming())


def starting(rank: int, base: Path) -> None:
    """Runs that begin where another ended, and move no weight."""
    still = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0, "warmup_steps": 0}
    for folder, (source, sections, _) in STARTS.items():
        keys = {"steps": 1, "start_from": base / source}
        run(config(base, folder, "one", optimizer=still, **{**sections, "run": keys}))


def by_hand(rank: int, base: Path) -> dict[str, tuple[Tensor, Tensor, Tensor, list[float]]]:
    """Losses of two rows by the model, by the formulas on whole rows, and by the model of the next token alone.

    And of each layer the share of a head that has positions, in a model whose decoder has none.
    The formulas share the transformer layers with the model, and nothing else behind the decoder's output.
    """
    found = {}
    for name, model_keys in {"untied": {}, "tied": {"tie_embeddings": True}}.items():
        made = small_config(base, name, model={"mtp_num_layers": 2, **model_keys}, nsa={"no_rope_freq": 1})
        row = torch.randint(0, 256, (2, 256 + 3), generator=torch.Generator().manual_seed(1))
        tokens, labels = row[:, :256], torch.stack([row[:, k : k + 256] for k in (1, 2, 3)], -1)
        with entered(made, torch.device("cpu")) as world, torch.no_grad():
            model = bare_model(made, world)[1]
            for number, weight in enumerate(model.parameters()):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
            seen: list[Tensor] = []
            model.decoder.register_forward_hook(lambda _, arguments, out, seen=seen: seen.append(out))
            ours, alone_ = (model(tokens, None, None, labels=asked) for asked in (labels, labels[..., 0].contiguous()))
            turned = [layer.self_attention.rotary.percent for layer in layers_of(model).values()]
            found[name] = ours, _losses(model, seen[0].transpose(0, 1), row), alone_, turned
    return found


def _losses(model: GPTModel, hidden: Tensor, row: Tensor) -> Tensor:
    """hidden [b, T, h] of the decoder, row [b, T + 3] -> [b, T, 3]."""
    table = model.embedding.word_embeddings.weight
    output = table if model.share_embeddings_and_output_weights else model.output_layer.weight
    length, found = hidden.shape[1], []
    for depth in range(3):
        if depth:
            layer = model.mtp.layers[depth - 1]
            read = table[row[:, depth : depth + length]]
            both = torch.cat([_norm(read, layer.enorm), _norm(hidden, layer.hnorm)], -1)
            put = (both @ layer.eh_proj.weight.T).transpose(0, 1)
            hidden = _norm(inner_layer(layer)(put, None)[0].transpose(0, 1), layer.final_layernorm)
        logits = (hidden @ output.T).log_softmax(-1)
        found.append(-logits.gather(-1, row[:, depth + 1 : depth + 1 + length, None])[..., 0])
    return torch.stack(found, -1)


def _norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
