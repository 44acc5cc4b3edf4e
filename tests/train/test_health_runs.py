"""Whole runs that are not well, over every layout: what is done about it, and what their records say of layers."""

import json
import math
from pathlib import Path

import pytest
import torch

from health_cases import BAD_STEP, LAYOUTS, bad_steps, one_rank, poked_replica, two_ranks
from ranks import run_ranks
from train_cases import STEPS, records, small_config, write_texts

ALL = list(range(0, 4 * STEPS, 4))
BAD = 4 * (BAD_STEP - 1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    write_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def told(base) -> list[dict]:
    return run_ranks(2, bad_steps, base)


# --- Steps that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(f"skip {layout}" for layout in LAYOUTS), "loss", "bf16", "no clipping"])
def test_a_skipped_step_touches_nothing_and_the_samples_go_on(base, told, name):
    for rank in told:
        assert rank[name].untouched == [True]
        assert rank[name].firsts == ALL
        assert (rank[name].result.step, rank[name].result.failure) == (STEPS, None)
    assert [r["step"] for r in records(base, name)] == [1, 2, 3, 5, 6], "it has no record of training"
    (found,) = all_records(base, name, "not_finite")
    assert (found["step"], found["samples"], found["action"]) == (BAD_STEP, [BAD, BAD + 3], "skip")
    shown = {"nan", "inf"} & {found["loss"], found["grad_norm"]}
    assert shown, "which of both it was"
    assert all(math.isfinite(r["loss"]) for r in records(base, name) + records(base, name, "validation"))


def test_stop_ends_the_run_and_writes_no_checkpoint(base, told):
    for rank in told:
        stopped = rank["stop"]
        assert stopped.untouched == [True]
        assert (stopped.result.step, stopped.result.stopped) == (BAD_STEP - 1, False)
        assert stopped.result.failure is not None
        assert stopped.result.failure.startswith(f"step {BAD_STEP} is not finite (loss ")
        assert f"over samples {BAD} to {BAD + 3}): not_finite=stop; skip and rewind go on" in stopped.result.failure
        assert stopped.result.checkpoint == str(base / "stop/checkpoints/step_00000002")
    assert sorted(path.name for path in (base / "stop/checkpoints").iterdir()) == ["step_00000002"]
    assert not (base / "stop/loss.png").exists()


def test_rewind_goes_back_and_leaves_the_samples_out(base, told):
    for rank in told:
        assert rank["rewind"].firsts == [0, 4, 8, 12, 8, 16, 20, 24]
        assert rank["rewind"].untouched == [True]
        assert rank["rewind"].result.failure is None
    once = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(base, "rewind")]
    without = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(base, "without them")]
    assert once == without, "as if these samples had never been there"
    assert told[0]["rewind"].weights == told[0]["without them"].weights
    made_twice = [r for r in all_records(base, "rewind", "train") if r["step"] == 3]
    assert len(made_twice) == 2
    assert made_twice[0]["loss"] == made_twice[1]["loss"]
    assert records(base, "rewind")[-1]["samples"] == 4 * (STEPS + 1)


def test_a_run_may_go_back_for_a_later_step(base, told):
    assert told[0]["rewind twice"].result.failure is None
    # Bad are the batches 12 and 20, met in steps 4 and 5; the checkpoint of step 4 is taken in between.
    assert told[0]["rewind twice"].firsts == [0, 4, 8, 12, 8, 16, 20, 24, 28]


def test_the_same_step_bad_again_ends_the_run(base, told):
    for rank in told:
        assert rank["same place"].firsts == [0, 4, 8, 12, 8, 16]
        assert "the run has gone back for step 4 before, and left its samples out" in rank["same place"].result.failure
    assert [r["action"] for r in all_records(base, "same place", "not_finite")] == ["rewind", "stop"]


def test_without_a_checkpoint_there_is_no_way_back(told):
    assert "there is no checkpoint yet; lower checkpoint_interval" in told[0]["no checkpoint"].result.failure


def test_skips_in_a_row_have_an_end(base, told):
    assert "4 steps in a row were not, and not_finite_limit=3" in told[1]["too many"].result.failure
    assert [r["action"] for r in all_records(base, "too many", "not_finite")] == ["skip"] * 3 + ["stop"]


def all_records(base: Path, name: str, kind: str) -> list[dict]:
    lines = map(json.loads, (base / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


# --- Replicas --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poked(base):
    return run_ranks(2, poked_replica, base)


@pytest.mark.parametrize("layout", ["CP2", "DP2"])
def test_a_replica_with_another_bit_stops_the_run_and_is_named(base, poked, layout):
    for rank in poked:
        assert rank[layout].failure is not None
        assert "after step 3 replicas of the weights are no longer the same: " in rank[layout].failure
        assert "decoder.layers.1.self_attention.linear_qkv.weight on ranks 0, 1." in rank[layout].failure
        assert rank[layout].step == 2
    assert sorted(path.name for path in (base / f"poked {layout}/checkpoints").iterdir()) == ["step_00000002"]


def test_tensor_parallel_halves_are_no_replicas(poked):
    assert poked[0]["TP2"].failure is None


# --- Layers and ranks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(base):
    run_ranks(1, one_rank, base)
    run_ranks(2, two_ranks, base)


def plain_health(base: Path, step: int) -> dict:
    """The record's layers from what was kept of every forward, written anew from their definitions."""
    kept, nsa = torch.load(base / f"plain {step}.pt"), small_config(base, "x").nsa
    layers = {}
    for layer, seen in kept["seen"].items():
        gates = torch.cat([g.flatten(0, 1) for g, _ in seen]).double()
        entropies = []
        for head in range(2):
            counts: dict[int, int] = {}
            for _, ids in seen:
                for token, row in enumerate(ids[:, head].tolist()):
                    own = token // nsa.slc_block_len
                    forced = set(range(nsa.num_init_blocks)) | set(range(own - nsa.num_local_blocks + 1, own + 1))
                    for block in set(row) - forced - {-1}:
                        counts[block] = counts.get(block, 0) + 1
            total = sum(counts.values())
            entropies.append(-sum(n / total * math.log(n / total) for n in counts.values()))
        branches = {
            branch: {
                "mean": gates[:, i].mean().item(),
                "low": (gates[:, i] < 0.05).double().mean().item(),
                "high": (gates[:, i] > 0.95).double().mean().item(),
            }
            for i, branch in enumerate(("cmp", "slc", "win"))
        }
        norms = {name: weight.double().norm().item() for name, weight in kept["phi"][layer].items()}
        layers[str(layer)] = {"gates": branches, "selection_entropy": entropies, "phi_norm": norms}
    return layers


def flat(value, path=()) -> dict[tuple, float]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, (*path, name)).items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), path)
    return {path: value}


@pytest.mark.parametrize("step", [2, 4, 6])
def test_values_of_layers_are_those_of_their_definitions(base, healthy, step):
    (found,) = [r for r in records(base, "one", "health") if r["step"] == step]
    assert flat(found["layers"]) == pytest.approx(flat(plain_health(base, step)), rel=1e-6)
    assert len(found["layers"]["1"]["phi_norm"]) == 6
    assert all(0 < h < math.log(16) for layer in found["layers"].values() for h in layer["selection_entropy"])


@pytest.mark.parametrize("layout", [*LAYOUTS, "recompute"])
def test_values_of_layers_do_not_depend_on_the_layout(base, healthy, layout):
    found, expected = records(base, layout, "health"), records(base, "one", "health")
    assert [r["step"] for r in found] == [2, 4, 6]
    for mine, other in zip(found[1:], expected[1:], strict=True):  # up to step 2 PP2 is a run of one process
        assert flat(mine["layers"]) == pytest.approx(flat(other["layers"]), rel=1e-4, abs=1e-6)
        assert len(mine["work_s"]) == 2
        assert min(mine["work_s"]) > 0


def test_watching_changes_no_loss(base, healthy):
    """Steps 2, 4 and 6 are watched in one run and none in the other."""
    watched, plain = records(base, "CP2"), records(base, "unwatched")
    assert [(r["loss"], r["grad_norm"]) for r in watched] == [(r["loss"], r["grad_norm"]) for r in plain]
    assert records(base, "unwatched", "health") == []
