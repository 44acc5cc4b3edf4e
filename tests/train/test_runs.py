"""Whole runs: every layout against one process, kill and resume, and what a run leaves behind."""

import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa_dist.train.files.manifest import Manifest, wrong_in_content
from ranks import run_ranks
from train_cases import (
    BF16_STEPS,
    CHANGED,
    FORK_STEP,
    KILL_STEP,
    LAYOUTS,
    STEPS,
    TINY_JOBS,
    counts_no_samples,
    goes_on,
    killed,
    largest_difference,
    records,
    refused,
    resumed,
    single_process,
    two_processes,
    write_texts,
)

KEPT = "damaged/checkpoints/step_00000006.damaged/.metadata"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def single(base):
    return run_ranks(1, single_process, base)[0]


@pytest.fixture(scope="module")
def pair(base, single):
    run_ranks(2, two_processes, base)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_process(base, pair, name):
    assert largest_difference(records(base, name), records(base, "single")) < 1e-6
    got, expected = (records(base, n, "validation") for n in (name, "single"))
    assert largest_difference(got, expected, names=("loss",)) < 1e-6


def test_recompute_changes_no_bit(base, pair):
    assert losses(records(base, "CP2 with recompute")) == losses(records(base, "CP2 zigzag"))


def test_bf16_trains_like_fp32_and_resumes_with_every_bit(base, pair):
    bf16, fp32 = records(base, "bf16"), records(base, "undisturbed")[:BF16_STEPS]
    assert largest_difference(bf16, fp32, names=("loss",)) < 0.01
    assert losses(records(base, "bf16 in two parts")) == losses(bf16)


@pytest.mark.parametrize("name", TINY_JOBS)
def test_the_tiny_job_does_not_depend_on_how_it_is_cut(base, pair, name):
    assert largest_difference(records(base, f"tiny/{name}"), records(base, "tiny/CP1"), names=("loss",)) < 1e-4


def losses(run: list[dict]) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in run]


def test_killed_and_resumed_repeats_every_bit(base, pair):
    with pytest.raises(mp.ProcessExitedException):
        run_ranks(2, killed, base)
    before = losses(records(base, "killed"))
    assert before[-1][0] == KILL_STEP - 1, "it died in a step whose checkpoint was not taken yet"
    result, _ = run_ranks(2, resumed, base)
    assert (result.step, result.stopped) == (STEPS, False)
    undisturbed = losses(records(base, "undisturbed"))
    assert before == undisturbed[: KILL_STEP - 1]
    assert losses(records(base, "killed")) == undisturbed
    lines = [json.loads(line) for line in (base / "killed/metrics.jsonl").read_text().splitlines()]
    assert len([r for r in lines if r["kind"] == "train"]) > len(undisturbed) - 1, "some steps were made twice"


def test_a_run_goes_on_past_a_damaged_checkpoint_and_repeats_every_bit(base, pair):
    assert losses(records(base, "damaged")) == losses(records(base, "undisturbed"))
    start = records(base, "damaged", "start")[-1]
    assert (start["step"], start["checkpoint"]) == (4, "step_00000004")
    assert start["verified_bytes"] > 100_000
    assert start["verified_s"] > 0
    (notice,) = start["notices"]
    assert notice == (
        f"checkpoints/step_00000006 is damaged (.metadata has {(kept := base / KEPT).stat().st_size} bytes, and "
        f"{(base / 'undisturbed/checkpoints/step_00000006/.metadata').stat().st_size} were written), and is kept as "
        f"checkpoints/step_00000006.damaged; the run goes on from step 4"
    )
    assert b"executed" in kept.read_bytes()
    assert not (base / "executed").exists(), "nothing of it was unpickled"


def test_a_manifest_lists_what_every_rank_wrote(base, pair):
    folder = base / "TP2/checkpoints/step_00000006"  # each holds a half of the weights
    manifest = Manifest.read(folder)
    assert manifest.files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= manifest.files.keys()
    assert wrong_in_content(manifest, folder, manifest.files) == []
    assert (manifest.step, manifest.samples) == (STEPS, STEPS * 4)


def test_a_stopped_run_says_so_and_goes_on(base, single):
    stopped, ended, listener, _, _ = single
    assert (stopped.step, stopped.stopped) == (FORK_STEP, True)
    assert not (base / "fork/loss.png").exists(), "pictures are of finished runs"
    assert (ended.step, ended.stopped) == (STEPS, False)
    assert ended.train_loss == records(base, "single")[-1]["loss"]
    assert ended.validation_loss == records(base, "single", "validation")[-1]["loss"]
    names = [(4, "step_00000004"), (6, "step_00000006")]
    assert listener.checkpoints == [(*name, ["train_loss", "validation_loss"]) for name in names]
    assert listener.num_records == 1 + STEPS - FORK_STEP + 2, "the start, steps and validations"


def test_a_resumed_run_follows_its_own_schedule(base, single):
    rates = [r["lr"] for r in records(base, "longer")]
    assert len(rates) == STEPS + 2
    assert rates[FORK_STEP] == pytest.approx(2e-3), "warmup ends at the rate of the new configuration"
    done = (STEPS + 2 - 1 - 2) / (STEPS + 2 - 2)  # of the decay, before the last step
    assert rates[-1] == pytest.approx(3e-4 + (2e-3 - 3e-4) * (1 + math.cos(math.pi * done)) / 2)


def test_the_latest_checkpoints_are_kept(base, single):
    assert sorted(p.name for p in (base / "single/checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert json.loads((base / "single/latest.json").read_text()) == {
        "step": STEPS,
        "checkpoint": "checkpoints/step_00000006",
    }


def test_what_may_change_changes_and_no_sample_comes_twice(base, single):
    seen = single.changed
    assert seen.samples == list(range(FORK_STEP * 4, FORK_STEP * 4 + (STEPS - FORK_STEP) * 2))
    optimizer = CHANGED["optimizer"]
    for group in seen.groups[0]:
        assert group["betas"] == (optimizer["adam_beta1"], optimizer["adam_beta2"])
        assert group["eps"] == optimizer["adam_eps"]
        assert group["weight_decay"] == pytest.approx(optimizer["weight_decay"] * group["wd_mult"])
    train = [r for r in records(base, "changed") if r["step"] > FORK_STEP]
    assert [r["samples"] for r in train] == [10, 12, 14, 16]
    assert [r["tokens"] for r in train] == [r["samples"] * 256 for r in train]
    lr, min_lr = optimizer["lr"], optimizer["min_lr"]
    expected = [min_lr + (lr - min_lr) * (STEPS - step) / (STEPS - 1) for step in range(FORK_STEP, STEPS)]
    assert [r["lr"] for r in train] == pytest.approx(expected)


def test_what_changed_is_in_the_start_record(base, single):
    first, second = (
        r for r in map(json.loads, (base / "changed/metrics.jsonl").read_text().splitlines()) if r["kind"] == "start"
    )
    assert first["changed"] == {}
    assert (second["step"], second["samples"]) == (FORK_STEP, FORK_STEP * 4)
    assert second["changed"].keys() == {f"{section}.{key}" for section, keys in CHANGED.items() for key in keys}
    assert second["changed"]["optimizer.lr"] == [3e-3, 2e-3]
    assert second["changed"]["run.global_batch_size"] == [4, 2]


def test_a_run_says_once_that_megatron_drops_a_part(single):
    newer = version("megatron-core") >= "0.17"
    assert len(single.notices) == newer, "and nothing else"
    assert all("GPTModel" in text for text in single.notices)
    assert single.listener.notices == [], "it goes on"


def test_what_cannot_go_on_is_refused_on_every_rank(base, pair):
    shutil.copytree(base / "fork", base / "spoiled")
    with (base / "spoiled/data/train.bin").open("r+b") as file:
        file.write(b"?")
    told = run_ranks(2, refused, base)
    assert told[0] == told[1]
    seed, held, spoiled = told[0]
    assert "run.seed: the run has 1234, given is 7" in seed
    assert "set resume=true" in held
    assert "train.bin" in spoiled
    assert "put the files back" in spoiled


def test_a_checkpoint_without_its_count_of_samples_is_refused(base, single):
    run_ranks(1, counts_no_samples, base, "old")
    with pytest.raises(mp.ProcessRaisedException, match=r"does not say how many samples.*start a new run"):
        run_ranks(1, goes_on, base, "old")


def test_metrics(base, single):
    train, validation = records(base, "single"), records(base, "single", "validation")
    assert [r["step"] for r in train] == list(range(1, STEPS + 1))
    assert [r["step"] for r in validation] == [0, 3, 6]
    assert train[0]["loss"] == pytest.approx(math.log(256), rel=0.15)
    assert validation[-1]["loss"] < validation[0]["loss"]
    for record in train:
        assert record["tokens"] == record["step"] * 4 * 256
        assert min(record["grad_norm"], record["lr"], record["tokens_per_s"], record["time_s"]) > 0


CP_RUNS = [name for name in LAYOUTS if name.startswith("CP2") and "whole shards" not in name]


@pytest.mark.parametrize("name", CP_RUNS)
def test_counted_bytes_are_those_of_the_formulas(base, pair, name):
    found = records(base, name, "traffic")
    assert [r["step"] for r in found] == list(range(FORK_STEP + 1, STEPS + 1))
    runs = 2 if name == "CP2 with recompute" else 1
    for record in found:
        assert record["sent_bytes"] == record["formula_bytes"]
        assert list(record["layers"]) == ["1", "2"]
        for layer in record["layers"].values():
            assert layer["sent_bytes"] == layer["formula_bytes"]
            # 16 blocks to the two bytes, 2 heads, 4 sequences, from each of 2 ranks to the other
            assert layer["sent_bytes"]["bitmap"] == runs * 2 * 2 * 4 * 2
            assert len(layer["union_fraction"]) == 2
            assert all(0 < u < 1 for u in layer["union_fraction"])
            # every chosen block of 16 tokens travels, with 8 + 8 fp32 numbers a token
            chosen = sum(layer["union_fraction"]) * 8 * 2 * 4
            assert layer["sent_bytes"]["pages.grad"] == pytest.approx(chosen * 16 * (8 + 8) * 4)


@pytest.mark.parametrize("name", TINY_JOBS)
def test_counted_bytes_of_one_head_in_two_halves_are_those_of_the_formulas(base, pair, name):
    found = records(base, f"tiny/{name}", "traffic")
    assert len(found) == 2
    for record in found:
        assert record["sent_bytes"] == record["formula_bytes"]
        assert record["sent_bytes"]["bitmap"] == 2 * 2 * 4 * 2 * 2  # halves, ranks, 32 blocks, sequences, layers


def test_pages_travel_again_in_backward_unless_they_are_kept(base, pair):
    travels = {"CP2 zigzag": 2, "CP2 with kept pages in rounds": 1, "CP2 with recompute": 3}
    for name, times in travels.items():
        sent = records(base, name, "traffic")[-1]["sent_bytes"]
        assert sent["pages"] == times * sent["pages.grad"], name


def test_whole_shards_send_more_than_was_chosen(base, pair):
    for record in records(base, "CP2 with whole shards", "traffic"):
        for layer in record["layers"].values():
            # All 8 blocks of the other rank, for 2 heads, 4 sequences and 2 ranks, 16 tokens of 8 + 8 fp32 numbers
            assert layer["sent_bytes"]["pages.grad"] == 8 * 2 * 4 * 2 * 16 * (8 + 8) * 4
            assert layer["formula_bytes"]["pages.grad"] < layer["sent_bytes"]["pages.grad"]
            assert layer["formula_bytes"]["halo"] == layer["sent_bytes"]["halo"]


def test_the_load_is_even_in_a_zigzag_only(base, pair):
    imbalance = {name: records(base, name, "traffic")[-1]["load_imbalance"] for name in CP_RUNS}
    assert imbalance["CP2 zigzag"] < 1.1 < imbalance["CP2 contiguous"]


def test_the_start_record_has_the_fetch_options(base, pair):
    (start,) = records(base, "CP2 with kept pages in rounds", "start")[-1:]
    expected = {
        "kind": "start", "step": FORK_STEP, "context_parallel_size": 2, "layout": "zigzag",
        "kv_fetch_budget_bytes": 4096, "whole_shard_fraction": 1.0, "keep_pages": True,
    }  # fmt: skip
    assert {name: start[name] for name in expected} == expected


def test_one_rank_records_no_traffic(base, single):
    assert records(base, "single", "traffic") == []
    assert records(base, "single", "start")[-1]["load_imbalance"] == 1


def test_traffic_in_tensorboard(base, pair):
    events = EventAccumulator(str(base / "undisturbed/tensorboard")).Reload()
    last = records(base, "undisturbed", "traffic")[-1]
    for path, expected in {
        "traffic/sent_bytes/halo": last["sent_bytes"]["halo"],
        "traffic/layers/2/formula_bytes/pages": last["layers"]["2"]["formula_bytes"]["pages"],
        "traffic/layers/1/union_fraction/0": last["layers"]["1"]["union_fraction"][0],
        "traffic/load_imbalance": last["load_imbalance"],
    }.items():
        event = events.Scalars(path)[-1]
        assert (event.step, event.value) == (STEPS, pytest.approx(expected)), path


def test_tensorboard(base, single):
    events = EventAccumulator(str(base / "single/tensorboard")).Reload()
    written = [(e.step, e.value) for e in events.Scalars("train/loss")]
    expected = [(r["step"], r["loss"]) for r in records(base, "single")]
    assert written == [(step, pytest.approx(loss)) for step, loss in expected]
    assert [e.step for e in events.Scalars("validation/loss")] == [0, 3, 6]


@pytest.mark.parametrize("name", ["loss.png", "selection.png"])
def test_pictures(base, single, name):
    picture = matplotlib.image.imread(base / "single" / name)[..., :3]
    assert min(picture.shape[:2]) >= 600
    colours = (255 * picture).astype(np.int64) @ [1 << 16, 1 << 8, 1]
    assert len(np.unique(colours)) > 20, "lines, letters and their edges"


def test_training_and_validation_files_are_listed(base, single):
    listing = json.loads((base / "single/data/corpus.json").read_text())
    assert set(listing["train"]["files"]).isdisjoint(listing["validation"]["files"])
    assert len(listing["train"]["files"]) + len(listing["validation"]["files"]) == 8
