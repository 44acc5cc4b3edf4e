"""Batches made ahead: the same ones in the same order, and errors where they belong."""

import traceback
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ahead_cases import ahead_and_not
from nsa_dist.train.data import ahead as module
from nsa_dist.train.data.ahead import Ahead
from nsa_dist.train.data.batches import BatchCutter, sequence_plan
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.refused import Refused
from ranks import run_ranks
from train_cases import records, small_config

SIZE, MICRO = 8, 2  # samples of a step, and of a micro-batch: two of them on each of two replicas
FAR = 100 * SIZE


class Source:
    """Sample n holds n everywhere; notes which were asked for; `bad` cannot be read."""

    def __init__(self, bad: int = -1, bounds=lambda n: [0, 256]) -> None:
        self.bad, self.bounds, self.drawn = bad, bounds, []

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        self.drawn.append(n)
        if n == self.bad:
            raise Refused(f"sample {n} is not there")
        row = torch.full((256,), n)
        return dict.fromkeys(Samples.names, row) | {"cu_seqlens": torch.tensor(self.bounds(n))}


def make_cutter(tmp_path, packer=None) -> BatchCutter:
    config = small_config(tmp_path, "x", run={"global_batch_size": SIZE, "micro_batch_size": MICRO})
    cp = SimpleNamespace(rank=0, size=1)
    world = SimpleNamespace(cp=cp, dp_rank=1, dp_size=2, device=torch.device("cpu"))
    return BatchCutter(config, world, sequence_plan(config), packer)


def numbers_of(batches) -> list[int]:
    return [int(n) for batch in batches for n in batch.tokens[:, 0]]


@pytest.mark.parametrize(
    "firsts",
    [[0, 8, 16, 24], [40, 48], [0, 8, 0, 8, 16], [0, 16, 24], [8, 8], [0, 8, 16, 24, 8, 24, 32]],
    ids=["from the start", "resumed", "gone back", "left out", "twice", "gone back, and one left out"],
)
def test_steps_have_the_samples_that_they_ask_for(tmp_path, firsts):
    cutter = make_cutter(tmp_path)
    ahead = Ahead(cutter, Source(), FAR)
    for first in firsts:
        found = list(ahead.micro_batches(first))
        ahead.make()
        expected = list(cutter.micro_batches(Source(), first))
        assert len(found) == len(expected) == 2
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in Samples.names)
        assert numbers_of(found) == [first + 2, first + 3, first + 6, first + 7]


def test_a_straight_run_draws_every_sample_once_and_in_order_and_those_of_a_step_in_the_one_before(tmp_path):
    source = Source()
    ahead = Ahead(make_cutter(tmp_path), source, FAR)
    for step in range(5):
        trained = numbers_of(ahead.micro_batches(step * SIZE))
        assert source.drawn[-4:] == trained
        ahead.make()
        assert source.drawn[-4:] == [n + SIZE for n in trained]
    assert all(a < b for a, b in pairwise(source.drawn))


def test_of_a_large_step_the_first_micro_batches_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 1)
    source = Source()
    ahead = Ahead(make_cutter(tmp_path), source, FAR)
    assert numbers_of(ahead.micro_batches(0)) == source.drawn
    ahead.make()
    assert source.drawn == [2, 3, 6, 7, 10, 11]
    assert numbers_of(ahead.micro_batches(8)) == source.drawn[4:] == [10, 11, 14, 15]


def test_what_a_run_will_not_need_is_drawn_only_when_asked_for(tmp_path):
    source = Source()
    ahead = Ahead(make_cutter(tmp_path), source, 2 * SIZE)
    assert numbers_of(ahead.micro_batches(SIZE)) == [10, 11, 14, 15]
    ahead.make()
    assert source.drawn == [10, 11, 14, 15]
    assert numbers_of(ahead.micro_batches(3 * SIZE)) == [26, 27, 30, 31], "a batch was left out, so one more is needed"
    ahead.make()
    assert source.drawn[4:] == [26, 27, 30, 31]


def test_a_step_that_was_left_in_the_middle_begins_anew(tmp_path):
    ahead = Ahead(make_cutter(tmp_path), Source(), FAR)
    list(ahead.micro_batches(0))
    ahead.make()
    next(ahead.micro_batches(8))
    assert numbers_of(ahead.micro_batches(8)) == [10, 11, 14, 15]


def test_an_error_is_raised_in_the_step_that_needs_the_sample(tmp_path):
    ahead = Ahead(make_cutter(tmp_path), Source(bad=14), FAR)
    assert numbers_of(ahead.micro_batches(0)) == [2, 3, 6, 7]
    ahead.make()  # it has happened, and nobody is told
    with pytest.raises(Refused, match="sample 14 is not there") as caught:
        list(ahead.micro_batches(8))
    assert "__getitem__" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert numbers_of(ahead.micro_batches(16)) == [18, 19, 22, 23], "others can be read"


def test_packs_are_planned_ahead_once_and_not_again_while_they_are_kept(tmp_path):
    planned, made = [], []

    class Packs:
        def cut(self, bounds):
            return None

        def plan(self, bounds):
            planned.append(bounds)
            return bounds

        def of(self, bounds, plan=None):
            made.append((bounds, plan))

    # Of documents [0, 100) in even steps, the row whole in odd ones.
    source = Source(bounds=lambda n: [0, 256] if n // SIZE % 2 else [0, 100, 256])
    ahead = Ahead(make_cutter(tmp_path, Packs()), source, FAR)
    for step in range(4):
        list(ahead.micro_batches(step * SIZE))
        before = len(planned)
        ahead.make()
        assert len(planned) == before + 1, "the next step's"
    some, whole = (0, 100, 256, 356, 512), (0, 256, 512)
    assert [bounds for bounds, _ in made] == [some, some, whole, whole] * 2
    assert [plan for _, plan in made] == [some, None, whole, None, some, None, whole, None]
    cutter = make_cutter(tmp_path, Packs())
    list(cutter.micro_batches(source, 0))
    assert made[-2:] == [(some, None)] * 2, "evaluation makes its packs itself, of those that are kept"


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_are_the_same_bit_for_bit_and_so_are_the_sums_of_what_was_sent(tmp_path):
    run_ranks(2, ahead_and_not, tmp_path)
    for kind in ("packed", "whole"):
        plain = records(tmp_path, f"{kind} without")
        names = ("step", "samples", "loss", "grad_norm", "lr")
        for other in ("ahead", "resumed"):
            found = records(tmp_path, f"{kind} {other}")
            assert [[record[name] for name in names] for record in found] == [
                [record[name] for name in names] for record in plain
            ]
            for which in ("validation", "tasks"):
                assert records(tmp_path, f"{kind} {other}", which) == records(tmp_path, f"{kind} without", which)
        every = {record["step"]: record for record in records(tmp_path, f"{kind} ahead", "traffic")}
        some = records(tmp_path, f"{kind} seldom", "traffic")
        assert [record["step"] for record in some] == [4, 6]
        assert all(record == every[record["step"]] for record in some)
