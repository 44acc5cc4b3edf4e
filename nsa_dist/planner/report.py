"""A plan as plain data, for JSON: everything that the table, the picture and the words are made of."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nsa_dist.planner.core.strategies import head_groups
from nsa_dist.planner.fetching import fetching
from nsa_dist.planner.inference import CachePlan
from nsa_dist.planner.sweep import Candidate, Plan
from nsa_dist.planner.verdict import CAVEATS, verdict


def as_data(plan: Plan, caches: Sequence[CachePlan] = ()) -> dict[str, Any]:
    """Dicts, lists, numbers and strings; keys end in their unit."""
    best = plan.best
    return {
        "cluster": plan.cluster.model_dump(mode="json"),
        "config": plan.config.model_dump(mode="json"),
        "options": {
            "union_fractions": list(plan.options.union_fractions),
            "kv_fetch_budget_bytes": plan.options.fetch.kv_fetch_budget_bytes,
            "keep_pages": plan.options.fetch.keep_pages,
            "domain_size": plan.options.fetch.domain_size,
            "overlap": plan.options.overlap,
        },
        "best_cp_size": best and best.cp_size,
        "candidates": [_candidate(plan, candidate) for candidate in plan.candidates],
        "inference": [cache.as_data() for cache in caches],
        "fetching": [asdict(row) for row in fetching(plan)],
        "verdict": verdict(plan),
        "caveats": list(CAVEATS),
    }


def _candidate(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    return {
        "cp_size": candidate.cp_size,
        "layout": candidate.layout,
        "tokens_per_rank": candidate.shape.plan.tokens_per_rank,
        "replicas": candidate.replicas,
        "idle_gpus": candidate.idle_gpus,
        "load_imbalance": candidate.imbalance,
        "head_groups": head_groups(candidate.shape.core, plan.options),
        "fits": candidate.fits(plan.cluster),
        "strategies": [
            {
                "name": outcome.strategy.name,
                "memory_bytes": outcome.memory_bytes,
                "held_bytes": outcome.held_bytes,
                "total_memory_bytes": outcome.total_bytes,
                "sent_bytes_per_step": outcome.sent_bytes,
                "pages_per_layer": outcome.pages,
                "compute_s": outcome.time.compute_s,
                "wire_s": outcome.time.wire_s,
                "step_s": outcome.time.total_s,
            }
            for outcome in candidate.outcomes
        ],
    }
