"""The cases of tests/cp, and what their spawned ranks run: importable, because processes find their work by name."""

import itertools
import traceback
from types import SimpleNamespace

import torch

from cases import PAPER, SMALL, make_inputs, run
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp.comm import Traffic
from nsa_dist.cp.options import FetchOptions
from nsa_kernels import reference
from ranks import groups_up_to

WORLD = 4
LAYOUTS = ("zigzag", "contiguous", "zigzag_documents")
EVERYTHING = NSAConfig(8, 4, 16, 64, 1, 2, 20)  # n beyond the number of blocks

# name: (config, document lengths, Hq, Hkv, Dk, Dv, rule that replaces the selection)
CASES = {
    "one document": (SMALL, [300], 4, 2, 8, 8, None),
    "paper sizes, packed": (PAPER, [1, 31, 32, 63, 65, 200], 4, 2, 8, 8, None),
    "ragged": (SMALL, [17, 64, 5, 129, 16, 40, 1], 4, 2, 8, 8, None),
    "fewer blocks than ranks": (SMALL, [20], 2, 1, 8, 8, None),
    "G=1": (SMALL, [150, 33], 2, 2, 8, 8, None),
    "G=2": (SMALL, [150, 33], 4, 2, 8, 8, None),
    "G=4": (SMALL, [150, 33], 4, 1, 8, 8, None),
    "Dk != Dv": (SMALL, [190], 4, 2, 12, 8, None),
    "window over several ranks": (NSAConfig(8, 4, 16, 5, 1, 2, 150), [260], 2, 1, 8, 8, None),
    "all choose one block": (SMALL, [260], 4, 2, 8, 8, "first"),
    "all choose everything": (EVERYTHING, [260], 4, 2, 8, 8, None),
    "none remote": (SMALL, [260], 4, 2, 8, 8, "own"),
    "one hot owner": (SMALL, [260], 4, 2, 8, 8, "early"),
    "nobody chooses anything": (SMALL, [260], 4, 2, 8, 8, "nothing"),
    "heads choose differently": (SMALL, [260], 4, 2, 8, 8, "by head"),
}

PAGE_BYTES = 16 * 2 * 8 * 8  # of SMALL, fp64, Dk = Dv = 8
MODES = {
    "one page a round": FetchOptions(kv_fetch_budget_bytes=1),
    "three pages a round": FetchOptions(kv_fetch_budget_bytes=3 * PAGE_BYTES + 1),
    "kept pages, rounds": FetchOptions(kv_fetch_budget_bytes=5 * PAGE_BYTES, keep_pages=True),
    "kept pages": FetchOptions(keep_pages=True),
    "always whole shards": FetchOptions(whole_shard_fraction=1e-9),
    "whole shards from a half": FetchOptions(whole_shard_fraction=0.5, kv_fetch_budget_bytes=7 * PAGE_BYTES),
}
FETCH = dict.fromkeys(CASES) | MODES
CASES |= {name: (SMALL, [150, 33, 80], 4, 2, 8, 8, None) for name in MODES}
CASES |= {"rounds without keys": (SMALL, [260], 4, 2, 8, 8, "by head")}
FETCH |= {"rounds without keys": FetchOptions(kv_fetch_budget_bytes=1)}
CASES |= {"one kv head, whole shards": (SMALL, [150, 33, 80], 2, 1, 8, 8, None)}
FETCH |= {"one kv head, whole shards": FetchOptions(whole_shard_fraction=0.4)}
CASES |= {name: (SMALL, [190, 40], 5, 5, 8, 8, None) for name in ("five kv heads", "five at once", "five one by one")}
FETCH |= {
    "five kv heads": None,  # in four groups, one of two
    "five at once": FetchOptions(head_groups=1),
    "five one by one": FetchOptions(head_groups=9, kv_fetch_budget_bytes=9 * PAGE_BYTES),
}
# What real processes add is the transport: these are enough to meet each collective, with and without rounds.
OVER_PROCESSES = ("one document", "ragged", "heads choose differently", "three pages a round", "rounds without keys")


def forced_selection(rule: str):
    """`nsa_kernels.reference` with a selection of one document that follows `rule` instead of importance."""

    def select_blocks(q, k_cmp, lse_cmp, cmp_begin, cmp_end, position, doc_start, *, num_slc_blocks, **sizes):
        own = torch.div(position, sizes["slc_block_len"], rounding_mode="floor")[:, None]  # [T, 1], -1: padding
        j = torch.arange(num_slc_blocks).expand(len(own), -1)
        ids = {
            "first": j.where((j == 0) & (own >= 0), -1),
            "own": own.where(j == 0, -1),
            "early": j.where((j <= own) & (j < 4), -1),
            "nothing": torch.full_like(j, -1),
            "by head": j.where(j <= own, -1),
        }[rule]
        ids = ids[:, None].repeat(1, k_cmp.shape[1], 1)
        first_head = k_cmp.storage_offset() // k_cmp.stride(1)  # ranks come with a few heads at a time
        if rule == "by head" and first_head + k_cmp.shape[1] > 1:
            ids[:, 1 - first_head] = -1
            ids[:, 1 - first_head, 0] = own[:, 0]
        return ids.to(torch.int32)

    return SimpleNamespace(**{**vars(reference), "select_blocks": select_blocks})


def make_plan(layout: str, lengths: list[int], size: int, cfg: NSAConfig) -> ShardPlan:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return getattr(ShardPlan, layout)(cu_seqlens, size, cfg.slc_block_len)


def all_cases(rank: int) -> dict[tuple, str]:
    """{(case, layout, cp_size): "" or what went wrong on this rank}."""
    groups = groups_up_to(WORLD)
    result = {}
    for name in OVER_PROCESSES:
        cfg, lengths, num_q_heads, num_kv_heads, dim_k, dim_v, rule = CASES[name]
        inputs = make_inputs(sum(lengths), num_q_heads, num_kv_heads, dim_k, dim_v, cfg)
        ops = forced_selection(rule) if rule else None
        expected = run(inputs, cfg, lengths, ops=ops)
        for layout, size in itertools.product(LAYOUTS, groups):
            if rank >= size:
                continue
            plan = make_plan(layout, lengths, size, cfg)
            got = run(inputs, cfg, lengths, plan, rank, groups[size], ops=ops, fetch=FETCH[name])
            for grad in got[3]:  # phi's parameters: every rank has its part
                torch.distributed.all_reduce(grad, group=groups[size])
            try:
                compare(got, expected, plan, rank)
                result[name, layout, size] = ""
            except AssertionError:
                result[name, layout, size] = traceback.format_exc(limit=2)
    return result


def compare(got, expected, plan: ShardPlan, rank: int) -> None:
    real = ~plan.padding(rank)
    ids = expected[1].long() + 1  # shard pads with 0; unused slots are -1
    assert torch.equal(got[1][real], plan.shard(ids, rank)[real].int() - 1), "block indices"
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(got[0][real], plan.shard(expected[0], rank)[real], **close)
    for mine, whole in zip(got[2], expected[2], strict=True):
        torch.testing.assert_close(mine[real], plan.shard(whole, rank)[real], **close)
        assert mine[~real].eq(0).all(), "padding got a gradient"
    for mine, whole in zip(got[3], expected[3], strict=True):
        torch.testing.assert_close(mine, whole, **close)


def traffic_of(rank: int, layout: str, lengths: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes counted, bytes by the closed formulas) of one forward and backward in fp64."""
    inputs = make_inputs(sum(lengths), 4, 2, 12, 8)
    plan = make_plan(layout, lengths, WORLD, SMALL)
    traffic = Traffic()
    _, ids, *_ = run(inputs, SMALL, lengths, plan, rank, torch.distributed.group.WORLD, traffic=traffic)
    return dict(traffic.sent_bytes), formulas(plan, ids, rank)


def formulas(plan: ShardPlan, own_ids: torch.Tensor, rank: int) -> dict[str, int]:
    width, others = 2 * (12 + 8) * 8, WORLD - 1  # bytes of one row of K and V over both kv heads
    ids = [torch.empty_like(own_ids) for _ in range(WORLD)]
    torch.distributed.all_gather(ids, own_ids)
    names = range(plan.num_blocks) if plan.block_ids is None else plan.block_ids.tolist()
    holders = {names[p // plan.block_len]: r for r in range(WORLD) for p in plan.stream_positions(r).tolist()}
    pages = sum(
        holders[block] == rank
        for r in range(WORLD) if r != rank
        for head in range(2)
        for block in set(ids[r][:, head].unique().tolist()) - {-1}
    )  # fmt: skip
    halo = 0
    position = {p: r for r in range(WORLD) for p in plan.stream_positions(r).tolist()}
    for r in range(WORLD):
        for segment in plan.segments(r):
            document, offset = plan.locate(torch.tensor([segment.start]))
            left = int(offset) if int(document) >= 0 else 0  # tokens of the same document before the segment
            for reach in (SMALL.cmp_block_len - SMALL.cmp_stride, 32):  # the window's 19 rows are two blocks
                rows = range(segment.start - min(reach, left), segment.start)
                halo += sum(position[p] == rank and r != rank for p in rows) * width
    last_tokens = [
        plan.stream_starts[d] + i * SMALL.cmp_stride + SMALL.cmp_block_len - 1
        for d in range(plan.num_documents)
        for i in range(SMALL.num_cmp_blocks(plan.cu_seqlens[d + 1] - plan.cu_seqlens[d]))
    ]
    most = max(sum(position[p] == r for p in last_tokens) for r in range(WORLD))
    page = plan.block_len * (12 + 8) * 8
    # Backward fetches again. What comes back as gradients the test sums over the ranks.
    return {
        "layout": others * 16,
        "halo": halo,
        "compressed": others * most * width,
        "compressed.grad": others * most * width,
        "bitmap": others * 2 * -(-plan.num_blocks // 8),
        "pages": 2 * pages * page,
    }


def disagreements(rank: int) -> dict[str, str]:
    """What each kind of layout that differs between two ranks raises."""
    group = groups_up_to(2)[2]
    if rank > 1:
        return {}
    messages = {}
    fetch = FetchOptions()
    for name, lengths, layout, cfg, options in (
        ("documents", ([128, 128], [64, 192])[rank], "zigzag", SMALL, fetch),
        ("layout", [256], LAYOUTS[rank], SMALL, fetch),
        ("config", [256], "zigzag", (SMALL, NSAConfig(8, 4, 16, 5, 1, 2, 21))[rank], fetch),
        ("fetch options", [256], "zigzag", SMALL, (fetch, FetchOptions(head_groups=1))[rank]),
    ):
        try:
            run(make_inputs(256), cfg, lengths, make_plan(layout, lengths, 2, cfg), rank, group, fetch=options)
            messages[name] = "nothing was raised"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def everything(rank: int):
    """All that tests/cp/test_ranks.py judges, in one spawn."""
    traffic = {layout: traffic_of(rank, layout, [300, 21]) for layout in LAYOUTS}
    return all_cases(rank), traffic, disagreements(rank)
