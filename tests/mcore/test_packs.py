"""Packed documents in Megatron's two orders over ranks, in fp64, against one process; and what is written to a pack."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from mcore_pack_cases import OVER_RANKS, PACKS, VARIANTS, WORLD, WRITES, everything, pack_of
from nsa_dist.cp.layout import rank_layout
from nsa_dist.mcore import NSATransformerConfig, plans
from nsa_dist.mcore.plans import Place, PlanCache, plan_pack
from ranks import run_ranks


@pytest.mark.parametrize(("bounds", "alignment"), [([0, 600, 2048], 128), ([0, 2048], 1)])
def test_the_layout_that_is_prepared_is_the_one_that_kernels_ask_for(monkeypatch, bounds, alignment):
    kernels = SimpleNamespace(WHOLE_TILES=SimpleNamespace(query_rows=128, key_rows=64, compressed_rows=128))
    monkeypatch.setattr(plans, "ops_for", lambda device, dtype: kernels)
    config = NSATransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, num_query_groups=1, attention_dropout=0.0
    )
    plan = plan_pack(pack_of(bounds), config, Place(1, 0, torch.device("cpu"))).plan
    kept = dict(plan._cache)
    rank_layout(plan, config.nsa, 0, torch.device("cpu"), alignment)
    plan.shard(torch.zeros(2048), 0)
    plan.unshard([torch.zeros(plan.tokens_per_rank)])
    assert plan._cache.keys() == kept.keys(), "nothing that is asked for was missing"


@pytest.fixture(scope="module")
def results():
    return run_ranks(WORLD, everything)


def assert_passed(results, name: str) -> None:
    for rank, by_name in enumerate(results):
        assert not by_name[name], f"rank {rank}: {by_name[name]}"


@pytest.mark.parametrize("pack", PACKS)
def test_a_row_that_is_cut_whole(results, pack):
    assert_passed(results, f"sequence: {(pack, '')}")


@pytest.mark.parametrize("pack", PACKS)
def test_a_row_that_is_cut_into_chunks(results, pack):
    assert_passed(results, f"chunks: {pack}")


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


def test_what_inference_leaves_on_a_pack_can_train():
    config = NSATransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=2, attention_dropout=0.0, hidden_dropout=0.0,
        context_parallel_size=2, nsa_pack_order="sequence",
    )  # fmt: skip
    with torch.inference_mode():
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 200, 512], dtype=torch.int32))
        rank_plan = PlanCache(config).of_packed(packed, 256, Place(2, 0, torch.device("cpu")))
    kept = [rank_plan.document_position, rank_plan.deal.given_rows, rank_plan.deal.plan_rows]
    assert not any(x.is_inference() for x in kept)
