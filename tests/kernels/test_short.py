"""The short way of selected attention: queries that chose all they see, against the reference and bit for bit.

That the bits are those of one rank, for any number of them, is in `test_ranks`; of any chunks of a prefill, in
`tests/inference/test_cache.py`.
"""

import pytest
import torch

import nsa_kernels
from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.test_slc_attention import check, make_case
from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.cp.layout import rank_layout
from nsa_dist.cp.pages import short_rows
from nsa_kernels.selected.attention import selected_attention, selected_attention_backward

LEN, SLOTS = 64, 2
CONFIG = NSAConfig(32, 16, LEN, SLOTS, 1, 1, 70)


def packed(doc_lens: list[int], plan: ShardPlan, rank: int, device, **shapes):
    """What one rank holds of documents, every query with SLOTS blocks, and which of them take the short way."""
    layout = rank_layout(plan, CONFIG, rank, torch.device("cpu"))
    own = (layout.position // LEN).tolist()
    first = (layout.doc_start // LEN).tolist()
    chosen = torch.full((len(own), 1, SLOTS), -1, dtype=torch.int32)
    for t, (a, b) in enumerate(zip(first, own, strict=True)):
        seen = sorted({a, b}) if b - a >= SLOTS else range(a, b + 1) if b >= 0 else []
        chosen[t, 0, : len(seen)] = torch.tensor(list(seen), dtype=torch.int32)
    case = make_case(
        layout.position, chosen, num_kv_heads=1, local_blocks=layout.local_blocks.tolist(), block_len=LEN,
        device=device, **shapes,
    )  # fmt: skip
    short = short_rows(rank_layout(plan, CONFIG, rank, device), slice(0, len(own)), CONFIG, nsa_kernels)
    return case, short


@pytest.mark.parametrize(
    ("doc_lens", "layout", "size", "rank", "copied", "mixed"),
    [
        pytest.param([300], "contiguous", 1, 0, False, False, id="one document"),
        pytest.param([70, 100], "contiguous", 1, 0, False, False, id="all are short"),
        pytest.param([40, 190, 200], "contiguous", 1, 0, False, True, id="a pack"),
        pytest.param([256], "contiguous", 4, 1, True, False, id="keys of another rank"),
        pytest.param([256, 256], "zigzag_documents", 2, 1, True, True, id="a pack over ranks"),
    ],
)
@pytest.mark.parametrize(
    "shapes",
    [
        {"group": 4, "dims": (32, 16)},
        pytest.param({"group": 1, "dims": (48, 32), "dtype": torch.float16}, marks=SLOW_WITHOUT_A_GPU),
        pytest.param({"group": 3, "dims": (16, 16), "dtype": torch.float32}, marks=SLOW_WITHOUT_A_GPU),
        pytest.param({"group": 16, "dims": (192, 128)}, marks=SLOW_WITHOUT_A_GPU),
        pytest.param({"group": 8, "dims": (128, 128)}, marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_forward_and_gradients(doc_lens, layout, size, rank, copied, mixed, shapes, device):
    bounds = torch.tensor([0, *doc_lens]).cumsum(0)
    case, short = packed(doc_lens, getattr(ShardPlan, layout)(bounds, size), rank, device, **shapes)
    assert (short.blocks is not None) == copied
    assert (short.spans is not None) == mixed
    check(case, block_len=LEN, short=short)


def results(case, short, rows, device):
    """out, lse and dq of the queries `rows`, and the sum of dk over them all."""
    part = [case.q[rows], case.k, case.v, case.block_indices[rows], case.block_table, case.position[rows]]
    sizes = {"slc_block_len": LEN, "softmax_scale": 0.25}
    out, lse = selected_attention(*part, **sizes, short=short)
    grad_out = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1)).to(device, case.q.dtype)[rows]
    delta = (grad_out.float() * out.float()).sum(-1)
    gate = torch.full_like(lse, -0.5)
    dq, dk, *_ = selected_attention_backward(grad_out, gate, delta, lse, *part, **sizes, short=short)
    return out, lse, dq, dk


@pytest.mark.parametrize("group", [4, pytest.param(1, marks=SLOW_WITHOUT_A_GPU)])
def test_a_document_has_the_same_bits_in_a_pack_and_in_pieces(group, device):
    """Out, lse and dq; the gradients of keys add up to those of the whole."""
    doc_lens = [100, 190, 64]
    bounds = torch.tensor([0, *doc_lens]).cumsum(0)
    plan = ShardPlan.contiguous(bounds, 1)
    layout = rank_layout(plan, CONFIG, 0, device)
    with torch.no_grad():
        case, short = packed(doc_lens, plan, 0, device, group=group, dims=(16, 16))
        whole = results(case, short, slice(0, len(case.q)), device)
        dk = torch.zeros_like(whole[3], dtype=torch.float32)
        for rows in (slice(0, 64), slice(64, 256), slice(256, 384)):
            piece = results(case, short_rows(layout, rows, CONFIG, nsa_kernels), rows, device)
            for name, a, b in zip(("out", "lse", "dq"), piece, whole, strict=False):
                assert torch.equal(a, b[rows]), f"{name} of {rows}"
            dk += piece[3].float()
    assert torch.allclose(dk, whole[3].float(), rtol=2**-6, atol=2**-8)


def test_what_the_others_hold_does_not_reach_a_document(device):
    """NaN in the keys and values of one document of a pack, in its queries and in what comes from above."""
    doc_lens = [100, 190]
    plan = ShardPlan.contiguous(torch.tensor([0, *doc_lens]).cumsum(0), 1)
    with torch.no_grad():
        case, short = packed(doc_lens, plan, 0, device, group=1, dims=(16, 16))
        first = slice(0, 128)
        expected = results(case, short, slice(0, len(case.q)), device)
        for x in (case.q, case.k, case.v):
            x[128:] = torch.nan
        found = results(case, short, slice(0, len(case.q)), device)
    for name, a, b in zip(("out", "lse", "dq", "dk"), found, expected, strict=True):
        assert torch.equal(a[first], b[first]), name


def test_an_odd_block_length_takes_the_long_way(device):
    """Where blocks are no whole tiles of keys, bits would depend on where they lie."""
    plan = ShardPlan.contiguous([0, 100], 1, 16)
    config = NSAConfig(32, 16, 16, 4, 1, 1, 70)
    assert short_rows(rank_layout(plan, config, 0, device), slice(0, 112), config, nsa_kernels) is None
