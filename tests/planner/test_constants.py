"""The constants of a cluster: where they come from, and what measured ones replace."""

import json
from pathlib import Path

import pytest
import yaml

from nsa_dist.planner.cluster import DEFAULT_CLUSTER, load_cluster
from nsa_dist.planner.core.strategies import Options, Strategy, sent_bytes
from nsa_dist.planner.core.time import all_reduce_s, wire_s
from nsa_dist.planner.measured import with_bench
from nsa_dist.planner.shape import Shape
from planner_cases import cluster, long_config


def test_a_constant_without_a_source_is_refused(tmp_path):
    raw = yaml.safe_load(DEFAULT_CLUSTER.read_text())
    del raw["link_efficiency"]["source"]
    raw["num_node"] = raw.pop("num_nodes")
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="did you mean 'num_nodes'") as error:
        load_cluster(path)
    assert "link_efficiency.source: this key is needed" in str(error.value)


def bench_file(folder: Path) -> Path:
    """Two cases as kernels/bench/run.py writes them, one of them with a branch that was wrong."""
    steps = ["compress k", "compress v", "cmp", "select", "slc", "win", "combine"]
    right = [{"step": s, "forward_TFLOP_per_s": 100.0, "backward_TFLOP_per_s": 50.0} for s in steps]
    del right[3]["backward_TFLOP_per_s"]
    wrong = [row if row["step"] != "slc" else {"step": "slc", "note": "WRONG: out"} for row in right]
    machine = {"device": "a GPU", "command": "python run.py", "copy_TB_per_s": 4.0, "bf16_TFLOP_per_s": 700.0}
    sizes = {"num_q_heads": 64, "num_kv_heads": 4, "tokens": 65536}
    cases = [{"case": "right", **sizes, "rows": right}, {"case": "wrong", **sizes, "tokens": 2**20, "rows": wrong}]
    path = folder / "bench.json"
    path.write_text(json.dumps({"machine": machine, "cases": cases}))
    return path


def test_measured_rates_replace_those_of_the_description(tmp_path):
    measured = with_bench(cluster(), bench_file(tmp_path), 16)
    assert measured.attention.slc.backward.value == 50e12
    assert measured.attention.select.backward is None
    assert measured.memory_bytes_per_s.value == 4e12
    assert measured.matmul_flops_per_s.source == "python run.py on a GPU, case right"
    assert measured.intra_node == cluster().intra_node


def cp_file(folder: Path, **sections) -> Path:
    """As `nsa-dist bench cp` writes it."""
    machine = {"device": "a GPU", "num_devices": 8, "date": "2026-01-01", "command": "nsa-dist bench cp"}
    path = folder / "cp.json"
    path.write_text(json.dumps({"machine": machine, "not_run": [], **sections}))
    return path


def test_measured_links_replace_those_of_the_description(tmp_path):
    rows = [
        {"cp_size": 8, "collective": "all_to_all", "sent_bytes": 2**28, "seconds": 1e-3, "bytes_per_s": 270e9},
        {"cp_size": 8, "collective": "all_gather", "sent_bytes": 2**28, "seconds": 2e-3, "bytes_per_s": 135e9},
        {"cp_size": 8, "collective": "all_to_all", "sent_bytes": 2**16, "seconds": 2e-5, "bytes_per_s": 3e9},
        {"cp_size": 2, "collective": "all_to_all", "sent_bytes": 2**28, "seconds": 1e-5, "bytes_per_s": 1e9},
        {"cp_size": 4, "error": "out of memory"},
    ]
    measured = with_bench(cluster(), cp_file(tmp_path, links=rows), 16)
    assert measured.link_efficiency.value == pytest.approx(270e9 / 450e9)
    assert measured.link_efficiency.evidence == "measured"
    assert measured.link_efficiency.source.endswith("a GPU, 2026-01-01, all_to_all of 268 MB over 8 ranks")
    assert measured.intra_node.latency_s.value == 2e-5
    achieved = measured.intra_node.achieved
    assert (achieved.all_to_all.value, achieved.all_gather.value) == (270e9, 135e9)
    assert achieved.reduce_scatter is None  # not measured here: the share of the datasheet's rate
    assert achieved.all_gather.source.endswith("2026-01-01, all_gather of 268 MB over 8 ranks")
    assert measured.inter_node == cluster().inter_node
    assert measured.attention == cluster().attention


def test_every_collective_takes_its_own_rate():
    """Seconds follow the bytes of each kind over the rate of the collective that moves it."""
    core = Shape.of(long_config(), 8, "zigzag").core
    link, options = cluster().intra_node, Options()
    latency_s = link.latency_s.value
    collectives = {"halo": "all_to_all", "compressed": "all_gather", "bitmap": "all_gather"}
    gradients = {"halo.grad": "all_to_all", "compressed.grad": "reduce_scatter"}
    sent, phases = (
        sent_bytes(core, Strategy("fetch", 0.2), options),
        wire_s(core, Strategy("fetch", 0.2), options, cluster()),
    )
    for kind, name in (collectives | gradients).items():
        seconds = (phases.backward if kind in gradients else phases.forward)[kind]
        assert seconds == pytest.approx(sent[kind] / getattr(link.achieved, name).value + latency_s)
    raw = Strategy("raw all-gather")
    sent, phases = sent_bytes(core, raw, options), wire_s(core, raw, options, cluster())
    gathered_s = sent["pages"] / 2 / link.achieved.all_gather.value + latency_s
    assert phases.forward["pages"] == phases.backward["pages"] == pytest.approx(gathered_s)
    assert phases.backward["pages.grad"] == pytest.approx(
        sent["pages.grad"] / link.achieved.reduce_scatter.value + latency_s
    )
    assert all_reduce_s(cluster(), cluster().inter_node, 2, 75e9) == pytest.approx(2 * 75e9 / 2 / (0.75 * 50e9))


def test_a_measured_share_gives_rates(tmp_path):
    """Two keys a query and head in the window of a document of 64 tokens: the rest by hand."""
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "dim_k": 16, "dim_v": 16, "element_bytes": 2}
    cfg = {"num_slc_blocks": 4, "window_len": 2}
    share = {
        "case": "tiny", "tokens": 64, "cp_size": 1, "layout": "zigzag", "mode": "fetch", "rank": 0, "peak_bytes": 1,
        "heads": heads, "cfg": cfg, "parts_s": {"forward.win": 1e-3, "backward.win": 2e-3, "forward.cmp": 0.0},
    }  # fmt: skip
    measured = with_bench(cluster(), cp_file(tmp_path, shares=[share]), 2)
    keys = 2 * 64 - 1
    assert measured.attention.win.forward.value == pytest.approx(keys * 2 * 2 * 32 / 1e-3)
    assert measured.attention.win.backward.value == pytest.approx(keys * 2 * 2 * 80 / 2e-3)
    assert measured.attention.cmp == cluster().attention.cmp


def test_a_file_that_measured_nothing_is_refused(tmp_path):
    rows = [{"case": "tiny", "error": "out of memory"}]
    with pytest.raises(ValueError, match="run nsa-dist bench cp --gpus all"):
        with_bench(cluster(), cp_file(tmp_path, shares=rows), 16)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("[]", "pass the bench.json"), ('{"machine": {}, "cases": []}', "run kernels/bench/run.py --preset targets")],
)
def test_files_without_rates(tmp_path, text, remedy):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(ValueError, match=remedy):
        with_bench(cluster(), tmp_path / "bench.json", 16)


def test_every_constant_says_where_it_comes_from():
    constants = cluster().constants()
    assert {c.evidence for c in constants.values()} == {"measured", "given", "assumed"}
    assert all(len(c.source) > 10 for c in constants.values() if c.source not in ("as forward",))
    assert "attention.slc.backward" in constants
