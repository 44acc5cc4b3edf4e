"""What the planner says of inference, against caches and models that are built."""

from dataclasses import replace

import pytest
import torch

from nsa_dist.inference.model import GPT
from nsa_dist.inference.over_ranks.storage import spread
from nsa_dist.inference.pool import CacheFullError, PagePool
from nsa_dist.planner.inference import CachePlan, cache_plans, most_pages, sentence
from nsa_dist.train.config import ModelSection, RunSection, TrainConfig
from nsa_dist.train.export.names import plain_config
from nsa_dist.train.sections.nsa import NSASection
from planner_cases import cluster, long_config
from thread_ranks import run_threads


def config(**nsa) -> TrainConfig:
    return TrainConfig(
        run=RunSection(output_dir="unused", sequence_length=256, dtype="bf16"),
        model=ModelSection(
            num_layers=3, hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=16, ffn_hidden_size=80,
            tie_embeddings=False,
        ),
        nsa=NSASection(num_slc_blocks=4, window_len=64, **nsa),
    )  # fmt: skip


SIZES = [{}, {"shared_kv": True, "compression": "mean"}, {"cmp_block_len": 64, "slc_block_len": 32}]


@pytest.mark.parametrize("nsa", SIZES, ids=["own", "shared", "keys of two pages follow"])
@pytest.mark.parametrize(("cp_size", "placement"), [(1, None), (3, None), (3, "sharded")])
def test_bytes_are_those_of_a_cache_that_is_made(nsa, cp_size, placement):
    (plan,) = cache_plans(config(**nsa), cluster(), 1000, 5, [cp_size])
    model = GPT(plan.model)
    assert plan.weight_bytes == sum(x.nbytes for x in model.state_dict().values())

    def work(comm):
        layers = [block.attention.make_cache(plan.pages, 5, cmp_placement=placement) for block in model.layers]
        if comm.size > 1:
            for layer in layers:
                spread(layer, comm)
        for layer in layers:
            seqs = [layer.new_sequence() for _ in range(5)]
            with layer.appending(seqs, [1000] * 5):
                pass  # the pages are enough
            assert layer.num_free_pages == min(pages_left(layer, plan.pages))
        expected = plan.bytes_if(placement) if placement else plan.cache_bytes
        assert sum(layer.num_bytes() for layer in layers) == expected

    def pages_left(layer, each):
        held = torch.cat([layer.state(seq).pages for seq in range(5)])
        return [each - int((held % cp_size == rank).sum()) for rank in range(cp_size)]

    run_threads(cp_size, work)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_sequences", [1, 2, 5, 8])
def test_the_fullest_rank_has_so_many_pages_and_no_fewer(cp_size, num_sequences):
    for pages in (1, 2, 7, 16):
        turns = [home + page for home in range(num_sequences) for page in range(pages)]
        most = most_pages(pages, num_sequences, cp_size)
        PagePool(most, cp_size).need(turns, "all")
        with pytest.raises(CacheFullError):
            PagePool(most - 1, cp_size).need(turns, "all")


def test_beyond_a_million_tokens_in_all_compressed_rows_are_sharded():
    (plan,) = cache_plans(long_config(), cluster(), 2**20, 1, [4])
    assert plan.cmp_placement == "replicated"
    assert replace(plan, num_tokens=2**20 + 2**16).cmp_placement == "replicated"
    assert replace(plan, num_tokens=2**20 + 2**16 + 1).cmp_placement == "sharded"
    assert replace(plan, num_sequences=2).cmp_placement == "sharded"


def test_the_longest_may_be_a_replicated_one():
    """A model so large that few tokens have room beside it."""
    model = plain_config(long_config())
    weights = CachePlan(model, cluster(), 1, 1, 4).weight_bytes
    memory = weights + cluster().reserved_bytes.value + 2**29
    small = cluster().model_copy(
        update={"gpu_memory_bytes": cluster().gpu_memory_bytes.model_copy(update={"value": memory})}
    )
    plan = CachePlan(model, small, 1, 1, 4)
    longest = replace(plan, num_tokens=plan.longest)
    assert (longest.fits, longest.cmp_placement) == (True, "replicated")
    assert not replace(plan, num_tokens=plan.longest + 1).fits
    assert replace(plan, num_tokens=plan.longest + 64).bytes_if("sharded") <= plan.room_bytes


@pytest.mark.parametrize("cp_size", [1, 4])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_the_longest_fits_and_a_page_more_does_not(cp_size, num_sequences):
    (plan,) = cache_plans(long_config(), cluster(), 2**20, num_sequences, [cp_size])
    assert replace(plan, num_tokens=plan.longest).fits
    assert not replace(plan, num_tokens=plan.longest + 1).fits
    dense = replace(plan, num_tokens=plan.longest_dense)
    assert dense.dense_bytes <= plan.room_bytes < replace(dense, num_tokens=dense.num_tokens + cp_size).dense_bytes
    assert 1 < plan.longest_dense / plan.longest < 1.08


def test_what_has_no_room_for_rings_has_none_for_tokens():
    small = cluster().model_copy(
        update={
            "gpu_memory_bytes": cluster().gpu_memory_bytes.model_copy(
                update={"value": cluster().reserved_bytes.value + 1}
            )
        }
    )
    plan = CachePlan(plain_config(config()), small, 100, 1, 1)
    assert (plan.longest, plan.longest_dense, plan.fits) == (0, 0, False)


def test_the_papers_sizes_are_a_dense_cache_and_a_sixteenth():
    plan, over_eight = cache_plans(long_config(), cluster(), 65536, 8, [1, 8])
    assert plan.token_bytes == plan.dense_token_bytes * (1 + 1 / 16) == 2176
    assert plan.cache_bytes == 4 * 8 * (65536 * 2176 + (512 + 8 + 32 + 8) * 2048)
    assert plan.dense_bytes == 4 * 8 * 65536 * 2048
    # 512k tokens in all: 128 bytes of each on the seven other ranks, too, or one key of four heads a page more.
    assert over_eight.cmp_placement == "replicated"
    assert over_eight.cache_bytes == 4 * (65536 * (2176 + 7 * 128) + 8 * 560 * 2048)
    assert over_eight.bytes_if("sharded") == 4 * (65536 * (2176 + 16) + 8 * 560 * 2048)
    data = over_eight.as_data()
    assert data["replicated_bytes"] == data["cache_bytes"]
    assert data["sharded_bytes"] == over_eight.bytes_if("sharded")
    assert sentence([plan]) == (
        "Inference, 8 sequences of 65,536 tokens: 2,176 bytes a token and layer, 1.0625 of a dense cache's 2,048, with "
        "keys and values for each branch; 8,704 a token of all 4 layers; for each sequence 4,587,520 more, its rings."
    )


@pytest.mark.parametrize("sizes", [(0, 1), (5, 0)])
def test_no_tokens_are_refused(sizes):
    with pytest.raises(ValueError, match="give for example --context 65536 --sequences 8"):
        cache_plans(config(), cluster(), *sizes, [1])
