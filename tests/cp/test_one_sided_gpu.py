"""Ranks that read each other's memory, a GPU each, over NCCL: against one rank and against collectives, bit for bit."""

from functools import cache

import pytest
import torch

import one_sided_gpu_cases as on
from cp_gpu_cases import NAMES

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices of one host")]


@cache
def outcome(work, **options) -> list:
    return on.on_gpus(NUM_GPUS, work, **options)


@pytest.fixture(params=[(name, layout) for name in on.CASES for layout in on.LAYOUTS], ids=str)
def found(request) -> list[dict]:
    """What every rank found."""
    return [of_rank[request.param] for of_rank in outcome(on.compare)]


def test_blocks_outputs_and_dq_have_the_bits_of_one_rank(found):
    for of_rank in found:
        assert of_rank["ids"]
        assert {"out", "dq", "dgates"} <= set(of_rank["same"])


def test_every_gradient_repeats_its_bits_from_tapes_too(found):
    for of_rank in found:
        assert of_rank["repeats"] == list(NAMES)
        assert of_rank["kept"] == list(NAMES)


def test_gradients_are_those_of_one_rank(found):
    for of_rank in found:
        assert max(of_rank["errors"].values()) < 1e-2
        assert max(of_rank["rounds"].values()) < 1e-2  # under a budget, ranges merged


@pytest.mark.parametrize("rule", on.RULES)
def test_forced_selections_by_both_transports(rule):
    for of_rank in outcome(on.fuzz):
        assert set(NAMES) - {"dk_win", "dv_win"} <= set(of_rank[rule]["same"])
        (one_sided, unions), (sent, unions_sent) = of_rank[rule]["counted"].values()
        assert one_sided == sent  # bytes of pages, their gradients, halos and compressed blocks, over all ranks
        assert unions == unions_sent


def test_a_captured_layer_stays_valid():
    for of_rank in outcome(on.captured):
        assert [name for name, same in of_rank.items() if not same] == []


def test_ranks_that_see_their_own_gpu_alone():
    assert outcome(on.chosen, masked=True) == ["one_sided"] * NUM_GPUS


def test_a_lost_rank_is_named_within_the_timeout():
    *others, _ = outcome(on.lost)
    for text in others:
        seconds, message = text.split(" s: ", 1)
        assert float(seconds) < on.LIMIT_S + 5
        assert message.startswith(f"rank {NUM_GPUS - 1} did not come")
