"""Which setting to change when a run does not fit: each is tried, and what it gives is said."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nsa_dist.planner.core.strategies import GIB, Options
from nsa_dist.planner.sweep import Candidate, Plan, make_plan
from nsa_dist.train.config import TrainConfig


@dataclass(frozen=True)
class Knob:
    """A change, in the words of the command line, and the best candidate it leads to."""

    words: str
    candidate: Candidate
    fits: bool


def turn_knobs(plan: Plan) -> list[Knob]:
    """Every single change that lowers memory, those that fit first, then the quicker; the model stays as it is."""
    least_bytes = min(c.judged.total_bytes for c in plan.candidates)
    found = []
    for words, config, options in _changes(plan.config, plan.options):
        try:
            turned = make_plan(config, plan.cluster, options)
        except ValueError:  # the cluster or the sequence has no room for this change
            continue
        candidate = turned.best or min(turned.candidates, key=lambda c: c.judged.total_bytes)
        if candidate.judged.total_bytes < least_bytes or candidate.fits(plan.cluster):
            found.append(Knob(words, candidate, candidate.fits(plan.cluster)))
    return sorted(found, key=lambda k: (not k.fits, k.candidate.judged.time.total_s if k.fits else _bytes(k)))


def _bytes(knob: Knob) -> int:
    return knob.candidate.judged.total_bytes


def _changes(config: TrainConfig, options: Options) -> Iterator[tuple[str, TrainConfig, Options]]:
    parallel, run = config.parallel, config.run
    wishes: list[tuple[str, dict[str, dict[str, Any]]]] = []
    if not config.model.recompute_attention:
        wishes.append(("model.recompute_attention=true", {"model": {"recompute_attention": True}}))
    if run.micro_batch_size > 1:
        wishes.append(("run.micro_batch_size=1", {"run": {"micro_batch_size": 1}}))
    tensor = 2 * parallel.tensor_model_parallel_size
    wishes.append(
        (
            f"parallel.tensor_model_parallel_size={tensor} parallel.sequence_parallel=true",
            {"parallel": {"tensor_model_parallel_size": tensor, "sequence_parallel": True}},
        )
    )
    stages = 2 * parallel.pipeline_model_parallel_size
    wishes.append(
        (
            f"parallel.pipeline_model_parallel_size={stages}",
            {"parallel": {"pipeline_model_parallel_size": stages}},
        )
    )
    wishes.append(
        (f"run.sequence_length={run.sequence_length // 2}", {"run": {"sequence_length": run.sequence_length // 2}})
    )
    for words, update in wishes:
        changed = _changed(config, update)
        if changed is not None:
            yield words, changed, options
    if (options.fetch.kv_fetch_budget_bytes or 2 * GIB) > GIB:
        fetch = replace(options.fetch, kv_fetch_budget_bytes=GIB)
        yield f"parallel.kv_fetch_budget_bytes={GIB}", config, replace(options, fetch=fetch)


def _changed(config: TrainConfig, update: dict[str, dict[str, Any]]) -> TrainConfig | None:
    """A copy with some keys replaced, or None where the configuration's own rules forbid it."""
    raw = config.model_dump()
    raw["parallel"]["context_parallel_size"] = 1  # the planner tries all sizes
    for section, values in update.items():
        raw[section].update(values)
    try:
        return type(config).model_validate(raw)
    except ValueError:
        return None
