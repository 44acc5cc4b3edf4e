"""Packed documents in the trainer: samples, who sees whom, every layout against one process, and what is learnt."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nsa_dist.train.data.batches import BatchCutter, sequence_plan
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.data.packs import Pack, Packer, joined
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.sections.data import DataSection
from pack_run_cases import (
    BOUNDS,
    FOURS,
    LETTERS,
    ORDERS,
    PAIRS,
    alone,
    answer_tasks,
    config,
    learn_alone,
    learn_over_ranks,
    over_ranks,
    seen,
    write_copies,
    write_documents,
)
from ranks import run_ranks
from train_cases import largest_difference, records, small_config

LENGTH = 64


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> IndexedDataset:
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "texts")
    write_corpus(DataSection(folder=folder / "texts"), folder / "data")
    return IndexedDataset(str(folder / "data/train"))


def test_a_packed_sample_has_the_same_tokens_and_knows_its_documents(documents):
    packed, whole = (Samples(documents, LENGTH, 3, packed=packed) for packed in (True, False))
    many = 0
    for n in range(packed.per_epoch):
        sample, same = packed[n], whole[n]
        assert torch.equal(sample["tokens"], same["tokens"])
        assert torch.equal(sample["labels"], same["labels"])
        assert same["cu_seqlens"].tolist() == [0, LENGTH]
        # The byte 0 ends every document, and stands nowhere else.
        ends = [i + 1 for i, token in enumerate(sample["tokens"].tolist()) if token == 0]
        assert sample["cu_seqlens"].tolist() == sorted({0, LENGTH, *ends})
        assert [i + 1 for i, weight in enumerate(sample["loss_mask"].tolist()) if not weight] == ends
        expected = [p for a, b in pairwise(sample["cu_seqlens"].tolist()) for p in range(b - a)]
        assert sample["position_ids"].tolist() == expected
        many += len(ends) > 2
    assert many > 3, "too few documents end in these samples to prove anything"


def test_where_the_stream_begins_again_there_is_a_bound(documents):
    total = int(documents.sequence_lengths[0])
    samples = Samples(documents, 2 * total + 1, 0, chosen=np.array([0]), packed=True)
    assert samples[0]["cu_seqlens"].tolist() == [0, total, 2 * total, 2 * total + 1]


def test_rows_of_a_micro_batch_are_one_pack():
    assert joined([torch.tensor([0, 3, 8]), torch.tensor([0, 8]), torch.tensor([0, 1, 8])]) == (0, 3, 8, 16, 17, 24)


@pytest.mark.parametrize("order", ORDERS)
def test_what_ranks_have_of_a_pack_is_put_together_by_samples(tmp_path, order):
    config = small_config(tmp_path, "x", parallel={"context_parallel_size": 2, **ORDERS[order]},
                          data={"documents": "packed"})  # fmt: skip
    parallel = config.parallel
    world = SimpleNamespace(cp=SimpleNamespace(size=2, rank=0))
    megatron = SimpleNamespace(nsa=config.nsa.sizes(), nsa_layout=parallel.layout, nsa_pack_order=parallel.pack_order)
    bounds = (0, 30, 256, 399, 512)
    packer = Packer(megatron, world)
    pack = Pack(bounds, packer.cut(bounds), None, None)
    row = torch.arange(1, 513)
    shards = [pack.shard(row, rank)[:, None] for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) >= 256
    cutter = BatchCutter(config, world, sequence_plan(config), packer)
    assert cutter.shape == (1, 512)
    assert torch.equal(cutter.samples_of(shards, pack), row.view(2, 256))


@pytest.mark.parametrize(
    ("sections", "remedy"),
    [
        ({"data": {"documents": "whole"}}, "leave it out, or take documents=packed"),
        ({"parallel": {"layout": "contiguous"}}, "leave it out, or take .*layout=zigzag"),
        ({"parallel": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}}, "take pack_order=sequence"),
    ],
)
def test_orders_that_there_are_not_are_refused(tmp_path, sections, remedy):
    given = {"data": {"documents": "packed"}, **sections}
    given["parallel"] = {"pack_order": "documents", **sections.get("parallel", {})}
    with pytest.raises(ValueError, match=remedy):
        small_config(tmp_path, "x", **given)


# --- who sees whom ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_no_document_sees_another_and_each_begins_at_position_0(tmp_path, attention):
    (logits,) = run_ranks(1, seen, tmp_path, attention)
    row, rewritten, alone_ = (logits[name] for name in ("row", "rewritten", "alone"))
    start, stop = BOUNDS[2:4]
    elsewhere = torch.arange(256).lt(start) | torch.arange(256).ge(stop)
    assert torch.equal(row[elsewhere], rewritten[elsewhere])
    assert not torch.equal(row[~elsewhere], rewritten[~elsewhere])
    torch.testing.assert_close(row, alone_, rtol=1e-5, atol=1e-5)
    joined_, again = logits["joined"], logits["joined and rewritten"]
    assert torch.equal(joined_[:start], again[:start])
    assert (joined_[stop:] - again[stop:]).abs().amax(-1).min() > 1e-4, "nobody would have seen it anyway"
    assert (joined_[33:] - row[33:]).abs().amax(-1).min() > 1e-4


# --- every layout against one process ---------------------------------------------------------------------------------


def agrees(base, name: str) -> None:
    assert largest_difference(records(base, name), records(base, "one")) < 1e-6
    got, expected = (records(base, n, "validation") for n in (name, "one"))
    assert largest_difference(got, expected, names=("loss",)) < 1e-6
    for mine, single in zip(records(base, name, "health"), records(base, "one", "health"), strict=True):
        for layer, values in single["layers"].items():
            assert mine["layers"][layer]["selection_entropy"] == pytest.approx(values["selection_entropy"], rel=1e-3)
            for branch, gates in values["gates"].items():
                assert mine["layers"][layer]["gates"][branch] == pytest.approx(gates, rel=1e-5)
    for record in records(base, name, "traffic"):
        assert record["sent_bytes"] == record["formula_bytes"]
    mine, single = (torch.load(base / run / "selection.pt") for run in (name, "one"))
    assert mine.shape == single.shape
    assert (mine != single).float().mean() < 0.01, "but where importances are nearly equal"


def test_the_picture_of_the_selection_is_of_the_longest_document(few):
    """Of the first micro-batch of the validation: every token of it, with ids that begin at its own first block."""
    made = config(few, "one")
    samples = Samples(IndexedDataset(str(few / "one/data/validation")), 256, made.run.seed, packed=True)
    lengths = torch.cat([samples[n]["cu_seqlens"].diff() for n in range(made.run.micro_batch_size)])
    blocks = torch.load(few / "one/selection.pt")
    own = torch.arange(len(blocks))[:, None] // made.nsa.slc_block_len
    assert len(blocks) == lengths.max() > 2 * made.nsa.slc_block_len
    assert (blocks <= own).all()
    assert (blocks == own).any(1).all()
    assert (blocks == 0).any(1).all(), "the first one is forced"


FEW = 4
FEW_PAIRS = {name: PAIRS[name] for name in PAIRS if name.startswith("CP2")}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    base = tmp_path_factory.mktemp("few")
    write_documents(base / "texts")
    run_ranks(1, alone, base, FEW)
    run_ranks(2, over_ranks, base, FEW_PAIRS, FEW)
    return base


@pytest.mark.parametrize("name", FEW_PAIRS)
def test_every_order_trains_like_one_process(few, name):
    agrees(few, name)


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_near_the_cuts_travel_unless_documents_are_cut_one_by_one(few, order):
    for record in records(few, f"CP2, {order}", "traffic"):
        assert (record["sent_bytes"]["tokens"] > 0) == (order != "each document in a zigzag")
        assert record["sent_bytes"]["pages.grad"] > 0


def test_rows_that_are_one_text_are_answered_alike_in_packs(few):
    run_ranks(2, answer_tasks, few)
    packed, whole = "tasks packed", "tasks whole"
    assert largest_difference(records(few, packed), records(few, whole)) < 1e-6
    assert records(few, packed, "tasks") == records(few, whole, "tasks")
    assert records(few, packed, "tasks")[-1]["tasks"]["copy"]["answers"] > 0


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    base = tmp_path_factory.mktemp("many")
    write_documents(base / "texts")
    run_ranks(1, alone, base)
    run_ranks(2, over_ranks, base, PAIRS)
    run_ranks(4, over_ranks, base, FOURS)
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAIRS, *FOURS])
def test_20_steps_of_every_layout_are_those_of_one_process(many, name):
    assert len(records(many, name)) == 20 + 2
    agrees(many, name)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    base = tmp_path_factory.mktemp("learnt")
    write_copies(base / "texts/copies")
    write_copies(base / "texts/scrambled", scrambled=True)
    run_ranks(1, learn_alone, base)
    run_ranks(2, learn_over_ranks, base)
    return {name: records(base, name, "validation")[-1]["loss"] for name in
            ("one", "dense", "scrambled", "wrong order", *ORDERS)}  # fmt: skip


@pytest.mark.slow
def test_copying_within_documents_is_learnt_in_every_order_and_not_of_scrambled_tokens(learnt):
    """Drawn letters cost ln 26 nats each, copies nothing but for the document that a row begins in: about 0.2 nats.

    The bar and the end of a document are certain.
    """
    tokens = 2 * LETTERS + 1  # that have a label of their own document
    copied, guessed = (math.log(26) * letters / tokens for letters in (LETTERS - 1, 2 * LETTERS - 1))
    for name in ("one", "dense", *ORDERS):
        assert learnt[name] < copied + 0.5 * (guessed - copied), name
    for name in ("scrambled", "wrong order"):
        assert learnt[name] > copied + 0.8 * (guessed - copied), name
