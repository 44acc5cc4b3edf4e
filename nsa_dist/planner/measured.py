"""Rates that the kernels' benchmark measured on a machine, in place of those a cluster description names.

`kernels/bench/run.py --out FOLDER` writes FOLDER/bench.json. Both count FLOPs alike: of pairs that are not masked, a
backward of attention 2.5 times its forward.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsa_dist.planner.cluster import BranchRates, Cluster, Constant, Rates
from nsa_dist.planner.measured_cp import with_cp_bench

# The benchmark's names of the rows.
_ROWS = {"phi": "compress k", "cmp": "cmp", "select": "select", "slc": "slc", "win": "win"}


def with_bench(cluster: Cluster, path: Path, group: int) -> Cluster:
    """`cluster` with what the file at `path` measured: bench.json of the kernels, or cp.json of `nsa-dist bench cp`.

    group       query heads of a kv head: of the cases the nearest counts, among equals the longest
    ValueError if the file is neither or has nothing whole to give.
    """
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
        if "not_run" in bench:
            return with_cp_bench(cluster, bench, group)
        cases = [case for case in bench["cases"] if _is_whole(case)]
        machine = bench["machine"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what nsa-dist bench writes ({type(error).__name__}: {error}), so it has no rates; pass "
            f"the bench.json of kernels/bench/run.py or the cp.json of nsa-dist bench cp, or leave --bench out"
        ) from None
    if not cases:
        raise ValueError(
            f"{path} has no case in which every branch was measured and right, so no rate can be taken from it; "
            f"run kernels/bench/run.py --preset targets on the GPU again"
        )
    case = min(cases, key=lambda c: (abs(c["num_q_heads"] / c["num_kv_heads"] - group), -c["tokens"]))
    source = f"{machine['command']} on {machine['device']}, case {case['case']}"
    rows = {row["step"]: row for row in case["rows"]}
    return cluster.model_copy(
        update={
            "matmul_flops_per_s": _measured(machine["bf16_TFLOP_per_s"] * 1e12, source),
            "memory_bytes_per_s": _measured(machine["copy_TB_per_s"] * 1e12, source),
            "attention": BranchRates(**{branch: _rates(rows[name], source) for branch, name in _ROWS.items()}),
        }
    )


def _is_whole(case: Mapping[str, Any]) -> bool:
    timed = {row["step"] for row in case["rows"] if "forward_TFLOP_per_s" in row}
    return timed.issuperset(_ROWS.values())


def _rates(row: Mapping[str, Any], source: str) -> Rates:
    backward = row.get("backward_TFLOP_per_s")
    return Rates(
        forward=_measured(row["forward_TFLOP_per_s"] * 1e12, source),
        backward=None if backward is None else _measured(backward * 1e12, source),
    )


def _measured(value: float, source: str) -> Constant:
    return Constant(value=value, evidence="measured", source=source)
