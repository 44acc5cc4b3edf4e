"""Batches made ahead: the same ones in the same order, errors where they belong, and no thread afterwards."""

import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from ahead_cases import ahead_and_not, ends
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
    """Sample n holds n everywhere; notes who asks for it; `bad` cannot be read."""

    def __init__(self, bad: int = -1, bounds=lambda n: [0, 256]) -> None:
        self.bad, self.bounds, self.drawn, self.threads = bad, bounds, [], set()

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        self.drawn.append(n)
        self.threads.add(threading.current_thread())
        if n == self.bad:
            raise Refused(f"sample {n} is not there")
        row = torch.full((256,), n)
        return dict.fromkeys(Samples.names, row) | {"cu_seqlens": torch.tensor(self.bounds(n))}


def make_cutter(tmp_path, packer=None) -> BatchCutter:
    config = small_config(tmp_path, "x", run={"global_batch_size": SIZE, "micro_batch_size": MICRO})
    cp = SimpleNamespace(rank=0, size=1)
    world = SimpleNamespace(cp=cp, dp_rank=1, dp_size=2, device=torch.device("cpu"))
    return BatchCutter(config, world, sequence_plan(config), packer)


def left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("samples-ahead")]


def numbers_of(batches) -> list[int]:
    return [int(n) for batch in batches for n in batch.tokens[:, 0]]


@pytest.mark.parametrize(
    "firsts",
    [[0, 8, 16, 24], [40, 48], [0, 8, 0, 8, 16], [0, 16, 24], [8, 8], [0, 8, 16, 24, 8, 24, 32]],
    ids=["from the start", "resumed", "gone back", "left out", "twice", "gone back, and one left out"],
)
def test_steps_have_the_samples_that_they_ask_for(tmp_path, firsts):
    cutter, source = make_cutter(tmp_path), Source()
    with Ahead(cutter, source, FAR) as ahead:
        for first in firsts:
            found = list(ahead.micro_batches(first))
            expected = list(cutter.micro_batches(Source(), first))
            assert len(found) == len(expected) == 2
            for a, b in zip(found, expected, strict=True):
                assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in Samples.names)
            assert numbers_of(found) == [first + 2, first + 3, first + 6, first + 7]
    assert threading.current_thread() not in source.threads
    assert not left()


def test_a_straight_run_draws_every_sample_once_and_in_order_and_not_far_ahead(tmp_path):
    source, far = Source(), module._MOST * MICRO
    with Ahead(make_cutter(tmp_path), source, FAR) as ahead:
        trained: list[int] = []
        for step in range(5):
            trained += numbers_of(ahead.micro_batches(step * SIZE))
            ahead.settle()
            assert source.drawn[: len(trained)] == trained
            assert len(source.drawn) == len(trained) + far, "the next step's are there, and no more than that"
    assert all(a < b for a, b in pairwise(source.drawn))


def test_what_a_run_will_not_need_is_drawn_only_when_asked_for(tmp_path):
    source = Source()
    with Ahead(make_cutter(tmp_path), source, 2 * SIZE) as ahead:
        assert numbers_of(ahead.micro_batches(SIZE)) == [10, 11, 14, 15]
        ahead.settle()
        assert source.drawn == [10, 11, 14, 15]
        # A batch was left out, so one more is needed.
        assert numbers_of(ahead.micro_batches(3 * SIZE)) == [26, 27, 30, 31]
        ahead.settle()
        assert source.drawn[4:] == [26, 27, 30, 31]


def test_a_step_that_was_left_in_the_middle_begins_anew(tmp_path):
    with Ahead(make_cutter(tmp_path), Source(), FAR) as ahead:
        next(ahead.micro_batches(0))
        assert numbers_of(ahead.micro_batches(0)) == [2, 3, 6, 7]


def test_an_error_is_raised_in_the_step_that_needs_the_sample(tmp_path):
    with Ahead(make_cutter(tmp_path), Source(bad=14), FAR) as ahead:
        assert numbers_of(ahead.micro_batches(0)) == [2, 3, 6, 7]
        ahead.settle()  # it has happened, and nobody is told
        with pytest.raises(Refused, match="sample 14 is not there") as caught:
            list(ahead.micro_batches(8))
        assert "__getitem__" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert numbers_of(ahead.micro_batches(16)) == [18, 19, 22, 23], "others can be read"
    assert not left()


def test_an_error_that_nobody_needs_is_none(tmp_path):
    with Ahead(make_cutter(tmp_path), Source(bad=10), FAR) as ahead:
        list(ahead.micro_batches(0))
        ahead.settle()
        list(ahead.micro_batches(16))


def test_no_thread_outlives_a_block_that_raises_and_what_it_had_to_do_is_given_up(tmp_path, monkeypatch):
    given_up, began, shutdown = threading.Event(), threading.Event(), ThreadPoolExecutor.shutdown

    class Slow(Source):
        def __getitem__(self, n):
            if n >= SIZE:
                began.set()
                assert given_up.wait(60)
            return super().__getitem__(n)

    def told(self, wait=True, **keys):
        shutdown(self, wait=False, **keys)
        given_up.set()
        shutdown(self, wait=wait)

    def fail(source: Source) -> None:
        with Ahead(make_cutter(tmp_path), source, FAR) as ahead:
            list(ahead.micro_batches(0))
            assert began.wait(60)
            raise ZeroDivisionError

    source = Slow()
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", told)
    with pytest.raises(ZeroDivisionError):
        fail(source)
    assert not left()
    assert source.drawn == [2, 3, 6, 7, 10, 11], "the micro-batch that it was at, and no other"


def test_packs_are_planned_ahead_once_and_not_again_while_they_are_kept(tmp_path):
    planned, made = [], []

    class Packs:
        def cut(self, bounds):
            return None

        def plan(self, bounds):
            planned.append((bounds, threading.current_thread()))
            return bounds

        def of(self, bounds, plan=None):
            made.append((bounds, plan))

    # Of documents [0, 100) in even steps, the row whole in odd ones.
    source = Source(bounds=lambda n: [0, 256] if n // SIZE % 2 else [0, 100, 256])
    with Ahead(make_cutter(tmp_path, Packs()), source, FAR) as ahead:
        for step in range(4):
            list(ahead.micro_batches(step * SIZE))
    some, whole = (0, 100, 256, 356, 512), (0, 256, 512)
    assert [bounds for bounds, _ in made] == [some, some, whole, whole] * 2
    assert [plan for _, plan in made] == [some, None, whole, None, some, None, whole, None]
    assert threading.current_thread() not in [thread for _, thread in planned]
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


def test_however_a_run_ends_no_thread_is_left(tmp_path):
    (found,) = run_ranks(1, ends, tmp_path)
    assert found == {
        "the last step": ("", []),
        "asked to stop": ("", []),
        "an error in a step": ("ZeroDivisionError: in step 3", []),
        "a sample that cannot be read": ("Refused: sample 9 is not there", []),
    }
