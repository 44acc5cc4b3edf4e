"""The closed formulas of bytes and work against brute force over tokens, and against what real ranks count."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from cases import PAPER, SMALL, make_inputs, run
from cp_cases import EVERYTHING, LAYOUTS, make_plan
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.formulas import cost, work
from nsa_dist.cp.layout import rank_layout
from nsa_dist.cp.options import FetchOptions
from ranks import groups_up_to, run_ranks

HEADS = cost.HeadSizes(num_q_heads=4, num_kv_heads=2, dim_k=12, dim_v=8, element_bytes=8)
LONG_WINDOW = NSAConfig(8, 4, 16, 5, 1, 2, 150)
PACKS = {
    "one document": [300],
    "ragged": [17, 64, 5, 129, 16, 40, 1],
    "empty document": [48, 0, 100],
    "shorter than a block": [3],
    "padding chunks": [20],
}
CPU = torch.device("cpu")


PLANS = [
    pytest.param(make_plan(layout, lengths, size, SMALL), id=f"{name}, {layout}, {size}")
    for name, lengths in PACKS.items()
    for layout in (*LAYOUTS, "contiguous_documents")
    for size in (1, 2, 3, 5)
]


# --- Against the layout and brute force over tokens ---------------------------------------------------------------


@pytest.mark.parametrize("cfg", [SMALL, LONG_WINDOW], ids=["small", "long window"])
@pytest.mark.parametrize("plan", PLANS)
def test_halo_rows_are_those_of_the_layout(plan, cfg):
    lengths = cost.halo_lengths(cfg)
    for rank in range(plan.cp_size):
        layout = rank_layout(plan, cfg, rank, CPU)
        for length, halo in zip(lengths, (layout.cmp_halo, layout.win_halo), strict=True):
            expected = [0 if q == rank else rows for q, rows in enumerate(halo.recv_sizes)]
            assert cost.halo_rows(plan, length)[rank] == expected


@pytest.mark.parametrize("plan", PLANS)
def test_compressed_blocks_and_keys_by_brute_force(plan):
    for rank in range(plan.cp_size):
        layout = rank_layout(plan, SMALL, rank, CPU)
        found = work.rank_work(plan, SMALL, rank)
        assert found.own_cmp_blocks == len(layout.cmp_rows)
        assert found.cmp_keys == int((layout.cmp_end - layout.cmp_begin).sum())
        assert found.win_keys == int((layout.win_end - layout.win_begin).sum())
        assert found.slc_keys == slc_keys_by_token(plan, rank)
    assert cost.total_cmp_blocks(plan, SMALL) == len(rank_layout(plan, SMALL, 0, CPU).cmp_gather_rows)


def slc_keys_by_token(plan: ShardPlan, rank: int) -> int:
    keys = 0
    for position in plan.document_positions(rank)[~plan.padding(rank)].tolist():
        own = position // SMALL.slc_block_len
        earlier = min(own, SMALL.num_slc_blocks - 1)  # all but its own are whole
        keys += earlier * SMALL.slc_block_len + position % SMALL.slc_block_len + 1
    return keys


@pytest.mark.parametrize("plan", PLANS)
def test_visible_remote_blocks_by_brute_force(plan):
    block_owner = plan.owner(torch.arange(plan.num_blocks) * plan.block_len)[0].tolist()
    for rank in range(plan.cp_size):
        documents, _ = plan.locate(plan.stream_positions(rank))
        visible = set()
        for document, position in zip(documents.tolist(), plan.stream_positions(rank).tolist(), strict=True):
            if document >= 0:
                first = plan.stream_starts[document] // plan.block_len
                visible |= set(range(first, position // plan.block_len + 1))
        expected = [0] * plan.cp_size
        for block in visible:
            expected[block_owner[block]] += block_owner[block] != rank
        assert cost.visible_remote_blocks(plan)[rank] == expected


# --- Against the bytes that real ranks count ------------------------------------------------------------------------

WORLD = 3
PAGE_BYTES = SMALL.slc_block_len * (HEADS.dim_k + HEADS.dim_v) * HEADS.element_bytes
COUNTED = {
    "one document": (SMALL, [300], FetchOptions()),
    "packed": (SMALL, [17, 64, 5, 129, 16, 40, 1], FetchOptions()),
    "everything chosen": (EVERYTHING, [260], FetchOptions()),
    "paper sizes": (PAPER, [1, 33, 400], FetchOptions()),
    "pages kept": (SMALL, [300], FetchOptions(keep_pages=True)),
    "rounds": (SMALL, [300], FetchOptions(kv_fetch_budget_bytes=3 * PAGE_BYTES)),
    "whole shards": (SMALL, [300], FetchOptions(whole_shard_fraction=0.5)),
    "one kv head, in query halves": (SMALL, [300], FetchOptions()),
    "one kv head, in query halves, packed": (SMALL, [17, 64, 5, 129, 16, 40, 1], FetchOptions()),
    "one kv head, halves of whole shards": (SMALL, [300], FetchOptions(whole_shard_fraction=0.5)),
    "one kv head, at once": (SMALL, [300], FetchOptions(head_groups=1)),
}


def heads_of(name: str) -> cost.HeadSizes:
    return replace(HEADS, num_kv_heads=1) if name.startswith("one kv head") else HEADS


def count_bytes(rank: int) -> dict:
    """{case: (bytes counted, block indices)} of one forward and backward in fp64 on this rank."""
    groups_up_to(WORLD)
    found = {}
    for name, (cfg, lengths, options) in COUNTED.items():
        for layout in LAYOUTS:
            heads = heads_of(name)
            inputs = make_inputs(sum(lengths), heads.num_q_heads, heads.num_kv_heads, heads.dim_k, heads.dim_v, cfg)
            plan, traffic = make_plan(layout, lengths, WORLD, cfg), Traffic()
            _, ids, *_ = run(
                inputs, cfg, lengths, plan, rank, torch.distributed.group.WORLD, traffic=traffic, fetch=options
            )
            found[name, layout] = dict(traffic.sent_bytes), ids
    return found


@cache
def counted() -> list[dict]:
    return run_ranks(WORLD, count_bytes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", COUNTED)
def test_formulas_equal_counted_bytes(name, layout):
    cfg, lengths, options = COUNTED[name]
    plan = make_plan(layout, lengths, WORLD, cfg)
    traffic, ids = zip(*(counted()[rank][name, layout] for rank in range(WORLD)), strict=True)
    pages = cost.pages_of(plan, ids, options.whole_shard_fraction)
    heads = heads_of(name)
    halves = options.halves_queries(heads.num_kv_heads)
    assert halves == ("halves" in name)
    sent = cost.sent_bytes(plan, cfg, heads, pages, refetch=not options.keep_pages, halves=halves)
    for rank, expected in enumerate(sent):
        expected["layout"] = cost.layout_check_bytes(plan)
        assert traffic[rank] == {kind: num_bytes for kind, num_bytes in expected.items() if kind in traffic[rank]}
        assert not any(num_bytes for kind, num_bytes in expected.items() if kind not in traffic[rank])
    if name == "everything chosen":
        assert pages == cost.pages_at(plan, HEADS, 1.0)


# --- Properties -----------------------------------------------------------------------------------------------------


def test_the_alternatives_move_the_whole_sequence():
    plan = ShardPlan.zigzag([0, 2**20], 8)
    heads = cost.HeadSizes(64, 4, 192, 128)
    whole = cost.sequence_kv_bytes(plan, heads)
    assert whole == 2**20 * 4 * (192 + 128) * 2
    sent = cost.whole_sequence_bytes(plan, heads)
    assert sent["pages"] == 2 * whole * 7 // 8  # forward and again in backward
    assert sent["pages"] // 2 + sent["pages.grad"] == 3 * whole * 7 // 8  # backward alone


def test_compressed_bytes_at_a_million_tokens():
    """168 MB of compressed keys and values for the whole sequence, 1/16 of one layer's."""
    plan, heads = ShardPlan.zigzag([0, 2**20], 8), cost.HeadSizes(64, 4, 192, 128)
    sent = cost.sent_bytes(plan, NSAConfig(), heads, cost.pages_at(plan, heads, 0.0), refetch=True)[0]
    assert sent["compressed"] == pytest.approx(168e6 * 7 / 8, rel=0.01)
    assert sent["pages"] == sent["pages.grad"] == 0


def test_pages_fall_with_the_union_fraction():
    plan, heads = ShardPlan.zigzag([0, 2**17], 8), cost.HeadSizes(64, 4, 128, 128)
    totals = [sum(map(sum, cost.pages_at(plan, heads, u))) for u in (0.0, 0.1, 0.2, 1.0)]
    assert totals[0] == 0
    assert totals[1] * 2 == pytest.approx(totals[2], rel=0.01)
    assert totals[2] == pytest.approx(0.2 * 4 * plan.num_blocks * 7, rel=0.01)
    assert totals[3] == pytest.approx(0.75 * 4 * plan.num_blocks * 7, rel=0.1)  # by causality a quarter is unseen


@pytest.mark.parametrize(("num_tokens", "least"), [(2**17, 1.4), (2**20, 1.7)])
def test_zigzag_balances_what_contiguous_does_not(num_tokens, least):
    bounds = [0, num_tokens]
    assert work.load_imbalance(ShardPlan.zigzag(bounds, 8), NSAConfig()) < 1.02
    assert work.load_imbalance(ShardPlan.contiguous(bounds, 8), NSAConfig()) > least


def test_flops_by_branch():
    """64k tokens, 64 heads of 128: 4.4 TFLOP of compressed attention, half of that to score blocks."""
    plan, heads = ShardPlan.zigzag([0, 2**16], 1), cost.HeadSizes(64, 4, 128, 128)
    found = work.rank_work(plan, NSAConfig(), 0)
    forward = work.forward_flops(found, heads, NSAConfig(), (128, 128))
    backward = work.backward_flops(found, heads, NSAConfig(), (128, 128))
    assert forward["cmp"] == pytest.approx(4.4e12, rel=0.01)
    assert forward["select"] * 2 == forward["cmp"]
    assert backward["slc"] * 2 == forward["slc"] * 5
    assert backward["select"] == 0
    assert forward["phi"] == 4095 * 4 * 2 * 2 * (32 * 128 * 128 + 128 * 128)
    assert work.forward_flops(found, heads, NSAConfig(), ())["phi"] == 0


def test_a_union_fraction_is_a_fraction():
    with pytest.raises(ValueError, match="pass 1 for the worst case"):
        cost.pages_at(ShardPlan.zigzag([0, 128], 2), HEADS, 1.5)
