"""Rates that the kernels' benchmark measured on a machine, in place of those a cluster description names.

`kernels/bench/run.py --out FOLDER` writes FOLDER/bench.json. Both count FLOPs alike: of pairs that are not masked, a
backward of attention 2.5 times its forward.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_dist.train.planner.cluster import BranchRates, Cluster, Constant, Rates

# The benchmark's names of the rows.
_ROWS = {"phi": "compress k", "cmp": "cmp", "select": "select", "slc": "slc", "win": "win"}


def with_bench(cluster: Cluster, path: Path, group: int) -> Cluster:
    """`cluster` with the rates in the bench.json at `path`, of the case nearest to `group` query heads a kv head.

    Among equally near cases the longest counts. ValueError if the file is not one or has no whole case.
    """
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
        cases = [case for case in bench["cases"] if _is_whole(case)]
        machine = bench["machine"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what kernels/bench/run.py writes ({type(error).__name__}: {error}), so it has no rates; "
            f"pass the bench.json of its --out folder, or leave --bench out"
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


def with_links(cluster: Cluster, rows: Sequence[Mapping[str, Any]], source: str) -> Cluster:
    """`cluster` with what the collectives of a node's GPUs achieved, rows as `nsa-dist bench cp --gpus` measures them.

    Of the largest group: the all-to-all that sent most gives the rate, of which the datasheet's is the whole; the
    quickest collective of all gives the latency. Links between nodes were not measured: they keep their rate and
    latency, and take over the share.
    """
    size = max(row["cp_size"] for row in rows)
    of_size = [row for row in rows if row["cp_size"] == size]
    largest = max((row for row in of_size if row["collective"] == "all_to_all"), key=lambda row: row["sent_bytes"])
    share = largest["bytes_per_s"] / cluster.intra_node.bytes_per_s.value
    least_s = min(row["seconds"] for row in of_size)
    told = f"{source}, all_to_all of {largest['sent_bytes'] / 1e6:.0f} MB over {size} ranks"
    intra_node = cluster.intra_node.model_copy(update={"latency_s": _measured(least_s, source)})
    return cluster.model_copy(update={"intra_node": intra_node, "link_efficiency": _measured(share, told)})


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
