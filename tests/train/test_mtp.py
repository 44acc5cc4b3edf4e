"""Multi-token prediction: labels against their definition in every cut, runs in every layout against one process."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtp_run_cases import (
    BACK,
    OF_FOUR,
    RUNS,
    STARTS,
    STEPS,
    alone,
    back,
    by_hand,
    config,
    halfway,
    over_ranks,
    starting,
)
from nsa_dist.inference.folder import save_model
from nsa_dist.train.data.batches import BatchCutter, sequence_plan
from nsa_dist.train.data.packs import Packer
from nsa_dist.train.export.run import plain_model
from nsa_dist.train.mtp.labels import predicted
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from ranks import run_ranks
from train_cases import largest_difference, records, small_config, write_texts

LENGTH, DEPTHS = 256, 3
BOUNDS = {0: [0, 30, 31, 33, 200, 256], 1: [0, 1, 2, 5, 250, 256], 2: [0, 256], 3: [0, 128, 254, 256]}
CUTS: dict[str, tuple[str, dict]] = {
    "whole": ("whole", {}),
    "packed": ("packed", {}),
    **{
        f"{documents}, {layout}, CP{size}": (documents, {"layout": layout, "context_parallel_size": size})
        for documents in ("whole", "packed")
        for layout in ("zigzag", "contiguous")
        for size in (2, 4)
    },
    **{
        f"a zigzag a document, CP{size}": ("packed", {"pack_order": "documents", "context_parallel_size": size})
        for size in (2, 4)
    },
}


# --- labels -----------------------------------------------------------------------------------------------------------


def token(n: int, i: int) -> int:
    """Token i of sample n: no other is the same, and none is 0."""
    return 1000 * (n + 1) + i


def weight(n: int, i: int) -> float:
    """Of the label of that token; the next one's is another."""
    return float(1 + (7 * i + n) % 5)


def sample(n: int, documents: str) -> dict[str, torch.Tensor]:
    """As `Samples` has it: the label of a document's last token weighs nothing."""
    bounds = BOUNDS[n] if documents == "packed" else [0, LENGTH]
    last = {end - 1 for end in bounds[1:-1]}
    return {
        "tokens": torch.tensor([token(n, i) for i in range(LENGTH)]),
        "labels": torch.tensor([token(n, i + 1) for i in range(LENGTH)]),
        "loss_mask": torch.tensor([0.0 if i in last else weight(n, i) for i in range(LENGTH)]),
        "position_ids": torch.arange(LENGTH),
        "cu_seqlens": torch.tensor(bounds),
    }


def defined(documents: str) -> dict[int, list[tuple[int, float]]]:
    """By token i, for each depth k: the token i + k + 1, and what it weighs, if all up to it are of one document.

    The sample's last token has a label that is behind the sample, and no other knows more of what is there.
    """
    found = {}
    for n, packed_bounds in BOUNDS.items():
        bounds = packed_bounds if documents == "packed" else [0, LENGTH]
        for start, end in pairwise(bounds):
            known = end + 1 if end == LENGTH else end
            for i in range(start, end):
                ahead = [i + depth + 1 for depth in range(1, DEPTHS + 1)]
                found[token(n, i)] = [
                    (token(n, j), weight(n, j - 1)) if j < known and j - 1 < end else (0, 0.0) for j in ahead
                ]
    return found


def batches(tmp_path: Path, cut: str) -> list:
    """What each context-parallel rank has of one micro-batch of all samples."""
    documents, parallel = CUTS[cut]
    made = small_config(
        tmp_path, "x", parallel=parallel, data={"documents": documents}, model={"mtp_num_layers": DEPTHS},
        run={"micro_batch_size": len(BOUNDS), "global_batch_size": len(BOUNDS)},
    )  # fmt: skip
    size, packer = made.parallel.context_parallel_size, None
    found = []
    for rank in range(size):
        world = SimpleNamespace(cp=SimpleNamespace(size=size, rank=rank))
        if documents == "packed":
            orders = {"nsa_layout": made.parallel.layout, "nsa_pack_order": made.parallel.pack_order}
            packer = Packer(SimpleNamespace(nsa=made.nsa.sizes(), **orders), world)
        cutter = BatchCutter(made, world, sequence_plan(made), packer)
        found.append(cutter.host_batch([sample(n, documents) for n in BOUNDS], range(len(BOUNDS))))
    return found


@pytest.mark.parametrize("cut", CUTS)
def test_labels_are_those_of_the_definition_in_every_cut(tmp_path, cut):
    expected, seen = defined(CUTS[cut][0]), []
    for part in batches(tmp_path, cut):
        rows = {name: x.flatten(0, 1) for name, x in part.parts.items()}
        for i, one in enumerate(rows["tokens"].tolist()):
            asked = zip(rows["mtp_labels"][i].tolist(), rows["mtp_loss_mask"][i].tolist(), strict=True)
            got = [(label if w else 0, w) for label, w in asked]
            assert got == (expected[one] if one else [(0, 0.0)] * DEPTHS), one
            if one:
                next_one, *others = rows["labels"][i].tolist(), *(label for label, _ in got)
                inputs = [next_one, *others][:DEPTHS]  # what the layers read: token i + k, where there is a label
                assert all(
                    token_ == one + k for k, (token_, (_, w)) in enumerate(zip(inputs, got, strict=True), 1) if w
                )
        seen += [one for one in rows["tokens"].tolist() if one]
    assert sorted(seen) == sorted(expected), "every token is on one rank"


def test_documents_that_are_too_short_ask_for_nothing():
    found = predicted(sample(1, "packed"), 300)
    assert found["mtp_labels"].shape == (LENGTH, 300)
    assert not found["mtp_loss_mask"][:2].any()
    assert found["mtp_loss_mask"][2].tolist() == [weight(1, 3), *[0.0] * 299], (
        "of three tokens, the last weighs nothing"
    )
    assert found["mtp_loss_mask"][5:250].count_nonzero() == sum(range(244))


# --- the model --------------------------------------------------------------------------------------------------------


def test_losses_of_every_depth_are_those_of_the_definition(tmp_path):
    (found,) = run_ranks(1, by_hand, tmp_path)
    for name, (losses, expected, next_alone, turned) in found.items():
        assert turned == [0.0, 0.0, 1.0, 1.0], "they have positions whatever no_rope_freq says of the decoder's"
        assert losses.shape == (2, LENGTH, 1 + 2), name
        assert torch.equal(losses[..., 0], next_alone), "an evaluation is that of the model without"
        torch.testing.assert_close(losses, expected, rtol=2e-5, atol=1e-5, msg=name)
        assert (losses[..., 1] - losses[..., 2]).abs().min() > 0


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mtp")
    write_texts(folder / "texts")
    run_ranks(1, alone, folder)
    save_model(plain_model(folder / "one")[0], folder / "one.folder")
    run_ranks(2, over_ranks, folder, [one for one in RUNS if one[1] not in OF_FOUR])
    run_ranks(4, over_ranks, folder, [one for one in RUNS if one[1] in OF_FOUR])
    run_ranks(2, starting, folder)
    run_ranks(2, halfway, folder)
    run_ranks(1, back, folder)
    return folder


def largest_ahead(got: list[dict], expected: list[dict]) -> float:
    """Relative, of the losses of multi-token prediction."""
    both = [pair for g, e in zip(got, expected, strict=True) for pair in zip(g["mtp_loss"], e["mtp_loss"], strict=True)]
    assert both
    return max(abs(mine - alone_) / alone_ for mine, alone_ in both)


@pytest.mark.slow  # 24 runs
@pytest.mark.parametrize(("name", "layout"), RUNS)
def test_every_layout_trains_like_one_process(base, name, layout):
    got, expected = records(base, f"{name} {layout}"), records(base, name)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    assert largest_difference(got, expected) < 1e-6
    assert largest_ahead(got, expected) < 1e-6
    both = [records(base, folder, "experts") for folder in (f"{name} {layout}", name)]
    if name == "experts":
        assert largest_difference(*both, ("load_balancing_loss", "busiest", "least")) < 1e-6
    got, expected = (records(base, folder, "validation") for folder in (f"{name} {layout}", name))
    assert got[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), BACK)
def test_one_process_goes_on_from_every_layout(base, name, layout):
    got, expected = records(base, f"{name} {layout} and back"), records(base, name)
    assert [r["step"] for r in got] == list(range(1, STEPS + 1))
    assert largest_difference(got, expected) < 1e-6
    assert largest_ahead(got, expected) < 1e-6


@pytest.mark.slow
def test_what_is_recorded(base):
    for name, depths in {"one": 1, "two, tied": 2, "packed": 2}.items():
        found = records(base, name)
        assert [len(record["mtp_loss"]) for record in found] == [depths] * STEPS
        for depth in range(depths):
            assert found[-1]["mtp_loss"][depth] < found[0]["mtp_loss"][depth] - 1
    assert list(records(base, "one", "health")[-1]["layers"]) == ["1", "2", "3"], "the one behind the two layers"
    assert list(records(base, "one CP2", "traffic")[-1]["layers"]) == ["1", "2", "3"]
    assert list(records(base, "experts", "experts")[-1]["layers"]) == ["2", "3"]
    assert list(records(base, "hybrid", "health")[-1]["layers"]) == ["1"], "as the last layer, which is dense"
    traffic = records(base, "one CP2", "traffic")[-1]
    assert traffic["sent_bytes"] == traffic["formula_bytes"]
    assert traffic["layers"]["3"]["sent_bytes"]["halo"] == traffic["layers"]["2"]["sent_bytes"]["halo"] > 0


@pytest.mark.slow
def test_it_is_no_part_of_the_other_losses_and_its_factor_counts(base):
    heavy, without = records(base, "one"), records(base, "of no weight")
    assert heavy[0]["loss"] == without[0]["loss"]
    assert heavy[0]["mtp_loss"] == without[0]["mtp_loss"]
    assert heavy[0]["grad_norm"] != without[0]["grad_norm"]
    assert heavy[-1]["mtp_loss"][0] < without[-1]["mtp_loss"][0] - 1, "nobody told it to learn"


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_from_another_with_other_layers(base, name):
    source = STARTS[name][0]
    expected = records(base, source.removesuffix(".folder"), "validation")[-1]["loss"]
    assert records(base, name, "validation")[0]["loss"] == pytest.approx(expected, rel=1e-6)
    (ahead,) = (record.get("mtp_loss", []) for record in records(base, name))
    learnt = records(base, "one")[-1]["mtp_loss"][0]
    known = [abs(loss - learnt) < 0.3 for loss in ahead]
    assert known == STARTS[name][2]


@pytest.mark.slow
def test_layers_are_the_runs_own(base):
    with pytest.raises(Refused, match=r"model\.mtp_num_layers: the run has 1, given is 2; the checkpoint's weights"):
        prepare_output(config(base, "one", "one", model={"mtp_num_layers": 2}).resuming())
    prepare_output(config(base, "one", "one", model={"mtp_loss_scaling_factor": 0.1}).resuming())
