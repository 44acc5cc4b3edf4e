"""Decoding from a paged cache against the fp64 reference: outputs by the twice rule, blocks, what the cache holds."""

from types import SimpleNamespace

import pytest
import torch

from kernels.judge import assert_twice
from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.paged import draw
from nsa_kernels.common import overlap
from nsa_kernels.decode import append, attention, chosen, phi, tiles
from nsa_kernels.decode_contracts import DecodeSizes
from nsa_kernels.reference import decode as reference


class Kernels:
    decode_append = staticmethod(append.decode_append)
    decode_store = staticmethod(append.decode_store)
    decode_compress_mlp = staticmethod(phi.decode_compress_mlp)
    decode_compress_mean = staticmethod(phi.decode_compress_mean)
    decode_attention = staticmethod(attention.decode_attention)
    decode_append_and_attend = staticmethod(attention.decode_append_and_attend)


def check(drawn, dtype, device, phis=None, turns=None):
    """Returns the kernels' results. phis: weights of both, in fp64."""

    def rounded_to(dtype, device="cpu"):
        found = phis and [[w.to(device, dtype) for w in phi] for phi in phis]
        return found, turns and [turn if turn is None else turn.to(device) for turn in turns]

    exact, plain, mine = drawn.to(torch.float64), drawn.to(dtype), drawn.to(dtype, device)
    expected, expected_blocks = exact.decode(reference, phis, turns)
    rounded, _ = plain.decode(reference, *rounded_to(dtype))
    out, blocks = mine.decode(Kernels, *rounded_to(dtype, device))
    assert torch.equal(blocks.cpu(), expected_blocks)
    assert_twice("out", out.cpu(), rounded, expected)
    for name, held, wanted in zip(exact.cache._fields, mine.cache, exact.cache, strict=True):
        if not isinstance(held, torch.Tensor):
            continue
        if name in ("k_cmp", "v_cmp"):  # phi was computed in another dtype
            wanted = plain.cache._asdict()[name]
            torch.testing.assert_close(held.cpu().double(), wanted.double(), rtol=1e-2, atol=1e-2, equal_nan=True)
        else:
            assert torch.equal(held.cpu().double().nan_to_num(7e7), wanted.double().nan_to_num(7e7)), name
    return out, blocks


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((4, 2, 16, 16), torch.bfloat16),
        pytest.param((3, 1, 48, 32), torch.float16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((2, 2, 16, 16), torch.float32, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 1, 16, 16), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((32, 2, 128, 128), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((16, 1, 192, 128), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 8, 64, 64), torch.bfloat16, marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_mixed_lengths_and_an_empty_slot(heads, dtype, device):
    check(draw([620, None, 0, 31], 1, heads, dtype=dtype), dtype, device)


def turn(half, factor=1.25):
    """Angles of `half` pairs, and a factor."""
    return torch.cat([0.7 ** torch.arange(half, dtype=torch.float64), torch.tensor([factor], dtype=torch.float64)])


@pytest.mark.parametrize(
    ("dims", "widths", "turns"),
    [
        ((32, 16), (16, 24), (turn(6), None)),
        pytest.param((16, 16), (24, 24), None, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((48, 32), (150, 40), (turn(24), turn(16)), marks=SLOW_WITHOUT_A_GPU),
        pytest.param((192, 128), (192, 128), (turn(96), None), marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 64), (64, 64), (turn(16), None), marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_several_new_tokens_and_phi_as_an_mlp(dims, widths, turns, device):
    """Blocks of which each token is in two, more than one of which becomes whole; some of sequences that had none."""
    sizes = DecodeSizes(8, 4, 16, 4, 1, 2, 20)
    phis = [
        [torch.randn(s).bfloat16().double() / s[1] ** 0.5 for s in ((1, 8, d), (1, 8 * d, width), (1, width, d))]
        for d, width in zip(dims, widths, strict=True)
    ]
    check(draw([41, 3, 0], 6, (2, 1, *dims), sizes), torch.bfloat16, device, phis, turns)


def compressed(drawn, device, phis, turns):
    """k_cmp, v_cmp of the kernels and of the reference, in fp32, behind phi of what is new."""
    for where, ops in ((device, Kernels), (torch.device("cpu"), reference)):
        mine = drawn.to(torch.float32, where)
        given = [turn if turn is None else turn.to(where) for turn in turns]
        appended = ops.decode_append(*mine.new, mine.cache, mine.slots, sizes=mine.sizes)
        if phis:
            ops.decode_compress_mlp(appended, mine.cache, *([w.to(where) for w in phi] for phi in phis), *given)
        else:
            ops.decode_compress_mean(appended, mine.cache, *given)
        yield [x.cpu().float() for x in mine.cache[2:4]]


def mlps(block_len, dim, width):
    return [
        [torch.randn(s) / s[1] ** 0.5 for s in ((1, block_len, dim), (1, block_len * dim, width), (1, width, dim))]
        for _ in range(2)
    ]


def test_phi_of_more_blocks_than_a_tile(device):
    """Of 18 sequences all but two have a block that becomes whole; some of each tile of 16."""
    sizes = DecodeSizes(8, 4, 16, 4, 1, 2, 20)
    drawn = draw([11, 10, *[15] * 15, 12], 1, (1, 1, 16, 16), sizes, torch.float32)
    mine, wanted = compressed(drawn, device, mlps(8, 16, 24), (turn(8), None))
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("turns", [(turn(5), None), (None, turn(8)), (None, None)])
def test_the_mean_turned(turns, device):
    """Of a head dim that is no power of two, one block; the other sequence has none that becomes whole."""
    mine, wanted = compressed(draw([30, 40], 2, (2, 2, 48, 16), dtype=torch.float32), device, None, turns)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "sizes",
    [(32, 16, 16, 3, 0, 1, 40), (64, 16, 32, 4, 1, 1, 5), (16, 16, 64, 3, 1, 2, 64), (32, 8, 32, 2, 1, 1, 1)],
    ids=["a row in three blocks", "a row in three blocks of two", "no overlap", "a window of one"],
)
def test_other_block_lengths(sizes, device):
    check(draw([300, 33], 2, (2, 1, 16, 16), DecodeSizes(*sizes), torch.float32), torch.float32, device)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((4, 2, 16, 16), torch.bfloat16), pytest.param((16, 1, 192, 128), torch.float16, marks=SLOW_WITHOUT_A_GPU)],
)
def test_pages_in_fp8(heads, dtype, device):
    """Held to fp64 on the same pages; new tokens, some beyond what e4m3 holds, enter theirs as the reference's do."""
    drawn = draw([620, None, 0, 100], 1, heads, dtype=dtype)
    drawn.new[2][0] *= 1e4
    check(drawn.in_fp8(0.5, 2.0), dtype, device)


@pytest.mark.parametrize("is_mlp", [False, True])
def test_phi_into_pages_in_fp8(is_mlp, device):
    """Of two numbers that differ by rounding one may be the next of e4m3."""
    drawn = draw([30, 47], 2, (2, 1, 16, 16)).in_fp8(0.25, 4.0)
    mine, wanted = compressed(drawn, device, mlps(32, 16, 16) if is_mlp else None, (None, turn(8)))
    torch.testing.assert_close(mine, wanted, rtol=0.13, atol=2**-9, equal_nan=True)


def test_with_what_is_new_in_the_first_launch(device):
    """The bits of a step that appends before, and the same cache, where no block becomes whole."""
    before, together = (draw([41, None, 0, 100], 3, (2, 1, 16, 16)).to(torch.bfloat16, device) for _ in range(2))
    expected, expected_blocks = before.decode(Kernels)
    out, blocks = attention.decode_append_and_attend(
        together.q, together.gates, together.new, together.cache, together.slots, sizes=together.sizes,
        softmax_scale=together.scale,
    )  # fmt: skip
    assert torch.equal(blocks, expected_blocks)
    assert torch.equal(out, expected)
    for name, mine, theirs in zip(before.cache._fields[:-2], together.cache, before.cache, strict=False):
        assert torch.equal(mine.nan_to_num(7e7), theirs.nan_to_num(7e7)), name


def test_splits_and_chunks_are_merged(device, monkeypatch):
    """Many of them, where a small case has one: the blocks are the same, the output to rounding."""
    monkeypatch.setattr(tiles, "TILE_CELLS", 16)
    monkeypatch.setattr(attention, "CHUNK_BLOCKS", 8)
    monkeypatch.setattr(chosen, "CANDIDATES", 16)
    check(draw([700, 200], 1, (2, 1, 16, 16)), torch.bfloat16, device)


def test_a_wider_table_changes_no_bit(device):
    """Programs past a sequence's end leave nothing that is read."""
    drawn = [draw([400, None, 90], 1, (2, 1, 16, 16), max_pages=pages).to(torch.bfloat16, device) for pages in (7, 40)]
    (out, blocks), (wide_out, wide_blocks) = (d.decode(Kernels) for d in drawn)
    assert torch.equal(blocks, wide_blocks)
    assert torch.equal(out, wide_out)


def test_an_empty_slot_is_zero(device):
    out, blocks = draw([None, 20], 2, (2, 1, 16, 16)).to(torch.bfloat16, device).decode(Kernels)
    assert not out[0].any()
    assert (blocks[0] == -1).all()
    assert out[1].any()


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda d: setattr(d, "slots", d.slots.long()), "pass slots of"),
        (lambda d: setattr(d, "gates", d.gates[..., :2]), "pass the cache of this layer"),
        (lambda d: setattr(d, "sizes", d.sizes._replace(window_len=400)), "make rings of"),
        (lambda d: setattr(d, "q", d.q.double()), "cast them first"),
    ],
)
def test_errors_name_the_remedy(change, remedy, device):
    drawn = draw([20], 1, (2, 1, 16, 16)).to(torch.bfloat16, device)
    change(drawn)
    with pytest.raises(ValueError, match=remedy):
        drawn.decode(Kernels)


def test_launches_begin_early_where_the_card_lets_them(device, monkeypatch):
    """A card from compute capability 9 on is asked for it, no other; the kernels are the same but for that."""
    assert overlap.overlapping(torch.empty(0)) == {"OVERLAPS": False}
    for major, options in ((8, {"OVERLAPS": False}), (9, {"OVERLAPS": True, "launch_pdl": True})):
        monkeypatch.setattr("nsa_kernels.common.device._major", lambda _, major=major: major)
        assert overlap.overlapping(SimpleNamespace(is_cuda=True, device="cuda:0")) == options


def test_what_the_kernels_take():
    assert attention.decode_takes(torch.bfloat16, 192, 128, 64)
    assert not attention.decode_takes(torch.float64, 128, 128, 64)
    assert not attention.decode_takes(torch.bfloat16, 128, 96, 64)
    assert not attention.decode_takes(torch.bfloat16, 128, 128, 48)
