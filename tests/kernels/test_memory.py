"""The planner's memory of a layer against what is alive while its kernels run, in triton's interpreter."""

from dataclasses import replace

import pytest
import torch

import nsa_kernels
from kernels.live_bytes import LiveBytes
from nsa_dist.bench.case import Case
from nsa_dist.bench.layer import layer_forward
from nsa_dist.bench.predicted import core_of, strategy_of
from nsa_dist.bench.selection import Replay, with_selection
from nsa_dist.bench.shard import drawn, make_shard
from nsa_dist.bench.solo import synthetic_comm
from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.planner.core import workspace
from nsa_dist.planner.core.memory import layer_peak_bytes
from nsa_dist.planner.core.strategies import Options
from nsa_kernels.interval import grad_kv as cmp_grad_kv
from nsa_kernels.selected import tiles as slc_tiles

CASE = Case(
    512, 1, heads=HeadSizes(16, 2, 16, 16), cfg=NSAConfig(num_slc_blocks=4, window_len=64), union_fraction=1.0
)  # fmt: skip


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("tokens", [512, 40_000, 131_072, 1_000_064])
@pytest.mark.parametrize("heads", [HeadSizes(64, 4, 128, 128), HeadSizes(16, 16, 192, 128)], ids=["G=16", "G=1"])
def test_the_planner_cuts_chunks_as_the_kernels_do(heads, tokens, forward):
    core = core_of(Case(tokens, 1, heads=heads))
    cuts = slc_tiles.chunks(core.tokens, heads.num_kv_heads, workspace.bytes_per_query(core, forward))
    rows, kv_heads = next(iter(cuts))
    assert workspace.chunk(core, heads.num_kv_heads, forward) == (rows.stop, kv_heads.stop)
    tiles = (slc_tiles.forward_tiles if forward else slc_tiles.backward_tiles)(core.group, heads.dim_k, heads.dim_v)
    assert tiles.item_rows == workspace.ITEM_ROWS[forward]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(
    ("cp_size", "budget", "mode"),
    [(1, None, "fetch"), (2, None, "fetch"), (4, None, "fetch"), (2, 2**15, "fetch"), (4, None, "shared all-gather")],
)
def test_memory_of_a_layer(cp_size, budget, mode, monkeypatch):
    """One rank of several, 512 tokens each; with a budget of eight pages in several rounds.

    dK and dV of the window are not summed in 16 parts: of so few keys they would decide, on a GPU they are 140 MB.
    """
    monkeypatch.setattr(cmp_grad_kv, "num_splits", lambda num_items: 1)
    case = replace(CASE, tokens=512 * cp_size, cp_size=cp_size, page_budget_bytes=budget, mode=mode)
    device = torch.device("cpu")
    shard, draw = make_shard(case, 512, device, seed=0), drawn(case, 0, device)
    comm = replace(synthetic_comm(case, 0, device), trace=None)
    forward = layer_forward(case, shard, comm, with_selection(nsa_kernels, Replay(draw.block_indices)))
    with LiveBytes() as live:
        torch.autograd.grad(forward(), shard.leaves, shard.grad_out)
    predicted = layer_peak_bytes(core_of(case), strategy_of(case), Options(fetch=case.fetch_options))
    assert predicted == pytest.approx(live.peak, rel=0.07)
