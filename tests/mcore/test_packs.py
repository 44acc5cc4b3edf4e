"""Packed documents in Megatron's two orders over ranks, in fp64, against one process; and what is written to a pack."""

import pytest

from mcore_pack_cases import OVER_RANKS, PACKS, VARIANTS, WORLD, WRITES, everything
from ranks import run_ranks


@pytest.fixture(scope="module")
def results():
    return run_ranks(WORLD, everything)


def assert_passed(results, name: str) -> None:
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"


@pytest.mark.parametrize("pack", PACKS)
def test_a_row_that_is_cut_whole(results, pack):
    assert_passed(results, f"sequence: {(pack, '')}")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v])
def test_a_row_that_is_cut_whole_in_variants(results, variant):
    assert_passed(results, f"sequence: {('documents of any length', variant)}")


@pytest.mark.parametrize("ranks", ["one rank", "two ranks"])
@pytest.mark.parametrize("name", WRITES)
def test_the_plan_follows_the_pack(results, name, ranks):
    assert_passed(results, f"{ranks}: {name}")


@pytest.mark.parametrize("name", OVER_RANKS)
def test_over_ranks(results, name):
    assert_passed(results, f"two ranks: {name}")
