"""Plans are plain data: no process, no device."""

import copy
import pickle
from contextlib import nullcontext
from threading import Lock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import SMALL
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp import layout
from nsa_dist.cp.device import on_host
from nsa_dist.cp.layout import rank_layout
from nsa_dist.cp.plan import LAYOUTS

plans = st.builds(
    lambda lengths, size, block, layout: ShardPlan((0, *torch.tensor(lengths).cumsum(0).tolist()), size, block, layout),
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from([4, 16]),
    st.sampled_from(LAYOUTS),
)


@given(plans)
@settings(max_examples=200, deadline=None)
def test_shard_and_unshard_are_inverse(plan):
    x = torch.arange(plan.num_tokens)
    shards = [plan.shard(x, rank) for rank in range(plan.cp_size)]
    assert all(len(s) == plan.tokens_per_rank for s in shards)
    assert torch.equal(plan.unshard(shards), x)
    for rank, shard in enumerate(shards):
        position = plan.positions(rank)
        assert torch.equal(shard[position >= 0], position[position >= 0])
        assert shard[position < 0].eq(0).all()
        assert torch.equal(plan.padding(rank), position < 0)


@given(plans)
@settings(max_examples=100, deadline=None)
def test_owner_finds_every_position(plan):
    for rank in range(plan.cp_size):
        owner, row = plan.owner(plan.stream_positions(rank))
        assert owner.eq(rank).all()
        assert torch.equal(row, torch.arange(plan.tokens_per_rank))
        assert all(s.start % plan.block_len == 0 and s.length % plan.block_len == 0 for s in plan.segments(rank))


@given(plans)
@settings(max_examples=100, deadline=None)
def test_document_positions(plan):
    expected = torch.cat([torch.arange(b - a) for a, b in zip(plan.cu_seqlens, plan.cu_seqlens[1:], strict=False)])
    shards = [plan.document_positions(rank) for rank in range(plan.cp_size)]
    assert torch.equal(plan.unshard(shards), expected)


@given(plans)
@settings(max_examples=100, deadline=None)
def test_intervals_never_decrease_and_cover_their_keys(plan):
    cfg = NSAConfig(8, 4, plan.block_len, 5, 1, 2, 20)
    blocks = 0
    for rank in range(plan.cp_size):
        layout = rank_layout(plan, cfg, rank, torch.device("cpu"))
        blocks += len(layout.cmp_rows)
        for begin, end, rows in (
            (layout.cmp_begin, layout.cmp_end, len(layout.cmp_gather_rows)),
            (layout.win_begin, layout.win_end, layout.win_halo.num_rows),
        ):
            assert (begin.diff() >= 0).all()
            assert (end.diff() >= 0).all()
            assert (begin <= end).all()
            assert begin.min() >= 0
            assert end.max() <= rows
        real = ~plan.padding(rank)
        sees = torch.minimum(plan.document_positions(rank) + 1, torch.tensor(cfg.window_len))
        assert torch.equal((layout.win_end - layout.win_begin)[real].long(), sees[real])
        # An extended row and its stream position agree modulo the block length: kernels anchor their tiles on it.
        assert torch.equal((layout.win_end[real] - 1) % plan.block_len, layout.position[real] % plan.block_len)
    assert blocks == sum(cfg.num_cmp_blocks(b - a) for a, b in zip(plan.cu_seqlens, plan.cu_seqlens[1:], strict=False))


def test_zigzag_is_megatrons_order():
    plan = ShardPlan.zigzag([0, 256], 2, 64)
    assert plan.positions(0).tolist() == [*range(64), *range(192, 256)]
    assert plan.positions(1).tolist() == list(range(64, 192))


def test_zigzag_documents_is_megatrons_order_for_packs():
    plan = ShardPlan.zigzag_documents([0, 16, 24], 2, 4)
    assert plan.positions(0).tolist() == [*range(4), *range(12, 16), *range(16, 20), *[-1] * 4]
    assert plan.positions(1).tolist() == [*range(4, 12), *range(20, 24), *[-1] * 4]
    assert plan.block_ids.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


def test_contiguous_documents_is_the_order_of_a_batch_of_contiguous_sequences():
    plan = ShardPlan.contiguous_documents([0, 16, 24], 2, 4)
    assert plan.positions(0).tolist() == [*range(8), *range(16, 20)]
    assert plan.positions(1).tolist() == [*range(8, 16), *range(20, 24)]


def test_auto_balances_long_documents_only():
    assert ShardPlan.auto([0, 1000], 4).layout == "zigzag"
    assert ShardPlan.auto([0, 374, 1000], 4).layout == "zigzag"
    assert ShardPlan.auto([0, 350, 700, 1000], 4).layout == "contiguous"


def test_one_rank_without_padding_copies_nothing():
    x = torch.arange(128)
    for plan in (ShardPlan.zigzag([0, 128], 1), ShardPlan.contiguous([0, 64, 128], 1)):
        assert plan.shard(x, 0) is x
        assert plan.unshard([x]) is x


def test_one_rank_derives_its_layout_once():
    """`nsa_attention` builds a plan in every call that has none; groups build, and agree about, each of theirs."""
    first, again, longer = (ShardPlan.contiguous([0, n], 1, 64) for n in (1000, 1000, 1001))
    cfg, cpu = NSAConfig(), torch.device("cpu")
    assert rank_layout(first, cfg, 0, cpu) is rank_layout(again, cfg, 0, cpu)
    assert len(rank_layout(longer, cfg, 0, cpu).position) == 1024
    assert first == again
    assert first != longer
    two = [ShardPlan.contiguous([0, 1000], 2, 64) for _ in range(2)]
    assert two[0] == two[1]
    assert two[0] is not two[1]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_leaves_behind_what_was_derived(copied):
    """Such as the locks and the driver's memory of launches that are kept, which nothing can copy."""
    plan = ShardPlan.zigzag([0, 300, 1000], 2, 64)
    plan.memo(("lock",), Lock)
    found = copied(plan)
    assert found == plan
    assert found._cache == {}
    assert torch.equal(found.positions(1), plan.positions(1))


def test_what_a_plan_keeps_is_made_on_the_host_without_a_mode_that_slows_torch():
    inside = []
    for mode in (nullcontext(), torch.device("meta"), torch.inference_mode()):
        with mode, on_host(), on_host():
            made = torch.zeros(1)
            inside.append((made.device.type, made.is_inference(), torch._C._len_torch_function_stack()))
    assert inside == [("cpu", False, 0), ("cpu", False, 2), ("cpu", False, 0)]


def test_a_layout_on_a_device_is_the_hosts_copied_there(monkeypatch):
    copied = []
    monkeypatch.setattr(layout, "put_on", lambda device, x: copied.append(x) or x.clone())
    plan, cfg, device = ShardPlan.zigzag([0, 100, 700], 2, 64), NSAConfig(), torch.device("cuda")
    host = rank_layout(plan, cfg, 1, torch.device("cpu"), 128)
    there = rank_layout(plan, cfg, 1, device, 128)
    assert there is rank_layout(plan, cfg, 1, device, 128)
    for a, b in ((there, host), *((getattr(there, name), getattr(host, name)) for name in ("cmp_halo", "win_halo"))):
        for name, x in vars(b).items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, getattr(a, name))
                assert (x is getattr(a, name)) == (name == "block_owner"), name
    assert there.host is host.host, "which the host reads"
    assert len(copied) == 7 + 6 + 2 * 3, "tensors of queries, of blocks, and of each halo, once"


def test_padding_never_reads_the_first_row():
    x = torch.full((3, 2), torch.nan)
    assert ShardPlan.zigzag([0, 3], 2, 4).shard(x, 1).eq(0).all()


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: ShardPlan.zigzag([0], 2), r"for one document pass \[0, num_tokens\]"),
        (lambda: ShardPlan.zigzag([0, 5, 3], 2), "never decrease"),
        (lambda: ShardPlan.zigzag([0, 5], 0), "at least 1"),
        (lambda: ShardPlan((0, 5), 2, 64, "spiral"), "use the class method of that name"),
        (lambda: ShardPlan.zigzag([0, 5], 2).shard(torch.zeros(4), 0), "build the plan from the cu_seqlens of this x"),
        (lambda: ShardPlan.zigzag([0, 5], 2).shard(torch.zeros(5), 2), r"ranks 0\.\.1"),
        (lambda: ShardPlan.zigzag([0, 5], 2).unshard([torch.zeros(128)]), "pass what `shard` returned"),
        (lambda: rank_layout(ShardPlan.zigzag([0, 5], 2), SMALL, 0, torch.device("cpu")), "block_len=16"),
    ],
)
def test_errors_name_the_remedy(make, remedy):
    with pytest.raises(ValueError, match=remedy):
        make()
