"""What is fetched and when all of a shard is, on one process."""

import numpy as np
import pytest
import torch

from cases import SMALL
from nsa_dist import ShardPlan
from nsa_dist.cp.fetch import pack_bits
from nsa_dist.cp.layout import rank_layout
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.sent.domains import Domains
from nsa_dist.cp.sent.lists import PageLists
from nsa_dist.cp.sent.travel import post_pages
from thread_ranks import run_threads

PLAN = ShardPlan.contiguous([0, 256], 2, 16)  # 8 blocks a rank


def wanted(*blocks: int) -> torch.Tensor:
    """bool [2, 2, 16]: rank 0 wants these blocks for head 1; rank 1 wants nothing."""
    marks = torch.zeros(2, 2, 16, dtype=torch.bool)
    marks[0, 1, list(blocks)] = True
    return marks


@pytest.mark.parametrize("blocks", [range(8, 16), [9, 12], [15], []], ids=["whole", "some", "one", "none"])
def test_pages_arrive_as_their_owner_holds_them(blocks):
    k = torch.arange(256.0).reshape(256, 1, 1) + torch.tensor([0.0, 0.25])[:, None]  # [N, Hkv, 1]

    def work(comm):
        layout = rank_layout(PLAN, SMALL, comm.rank, k.device)
        (route,) = PageLists(pack_bits(wanted(*blocks)), layout, Domains(1, 2, comm.rank), None).routes()
        own = PLAN.shard(k, comm.rank)
        return route, post_pages(own, -own, route, 16, comm, "pages").wait()

    (_, got), (sender, nothing) = run_threads(2, work)
    assert (sender.whole_heads == (1,)) == (len(blocks) == 8)
    assert len(nothing) == 0
    rows = torch.tensor([*blocks], dtype=torch.int64)[:, None] * 16 + torch.arange(16)
    assert torch.equal(got[..., 0], rows + 0.25)
    assert torch.equal(got[..., 1], -rows - 0.25)


def test_bits_survive_packing():
    marks = torch.rand(3, 21) < 0.5
    packed = pack_bits(marks)
    assert packed.shape == (3, 3)
    assert (np.unpackbits(packed.numpy(), axis=1, count=21, bitorder="little") == marks.numpy()).all()


def test_the_threshold_is_where_both_ways_take_the_same_time():
    link, gather, copy = 50e9, 1e12, 2e12
    u = FetchOptions.for_link(link, gather, copy).whole_shard_fraction
    assert u * (1 / link + 1 / gather) == pytest.approx(1 / link + 1 / copy)
    assert FetchOptions.for_link(1e9, gather, copy).whole_shard_fraction > u  # a slow link: bytes are all that counts
    assert FetchOptions.for_link(link, copy, gather).whole_shard_fraction == 1.0
    assert FetchOptions.for_link(link, gather, copy, keep_pages=True).keep_pages


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: FetchOptions(kv_fetch_budget_bytes=0), "pass None for no bound"),
        (lambda: FetchOptions(whole_shard_fraction=0), "1 sends only what was chosen"),
        (lambda: FetchOptions(head_groups=0), "pass 1 to move all of them at once"),
        (lambda: FetchOptions.for_link(0, 1, 1), "pass measured ones"),
    ],
)
def test_errors_name_the_remedy(make, remedy):
    with pytest.raises(ValueError, match=remedy):
        make()
