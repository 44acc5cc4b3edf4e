"""Decoding from a cache whose tokens lie in parts that each have all compressed rows, against the fp64 reference."""

import math
from functools import partial

import pytest
import torch

from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.paged import PAPER, Drawn, draw
from kernels.parts import check_step, the_answer
from nsa_kernels.decode import append, attention, tiles
from nsa_kernels.decode_contracts import DecodeSizes, from_pages
from nsa_kernels.decode_part import attention as of_parts
from nsa_kernels.decode_part import part, store


def cut(drawn: Drawn, step: int) -> list[part.TokenPart]:
    """NaN in the pages of tokens of the others; compressed rows of page p lie behind those of the page after it."""
    cache, parts = drawn.cache, []
    slots = torch.arange(len(cache.lengths), device=cache.lengths.device)
    pages = torch.arange(cache.page_table.shape[1], device=slots.device)
    exists = cache.page_table < len(cache.k_slc)
    moved = torch.arange(len(cache.k_slc) - 1, -1, -1, device=slots.device)
    cmp_table = torch.where(exists, moved[cache.page_table.clamp(max=len(moved) - 1).long()], 2**30).to(torch.int32)
    for index in range(step):
        here = (pages + slots[:, None]) % step == index
        own = cache.page_table[here & exists].long()
        pools = [torch.full_like(x.to(torch.float32), math.nan).to(x.dtype) for x in cache[:2]]
        for pool, x in zip(pools, cache[:2], strict=True):
            as_bytes(pool)[own] = as_bytes(x)[own]
        rows = [as_bytes(x)[moved].view(x.dtype) for x in cache[2:4]]
        rest = [x.clone() for x in cache[4:8]]
        tensors = [*pools, *rows, *rest, torch.where(here, cache.page_table, -1), cache.lengths.clone()]
        mine = cache._replace(**dict(zip(cache._fields[: len(tensors)], tensors, strict=True)))
        parts.append(part.TokenPart(mine, cmp_table))
    return parts


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def decoded(drawn: Drawn, parts: list[part.TokenPart]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and blocks, which are the same for every part."""
    sizes, new, steps = drawn.sizes, drawn.q.shape[1], []
    for mine in parts:
        appended = append.decode_append(*drawn.new, mine.cache, drawn.slots, sizes=sizes)
        cells = store.all_cells(appended, mine, drawn.slots, new, sizes=sizes)
        means = [x.unflatten(0, (-1, sizes.cmp_block_len)).mean(1) for x in (appended.k_raw, appended.v_raw)]
        append.decode_store(*means, cells, mine.whole)
        steps.append(
            of_parts.TokenPartAttention(
                drawn.q, drawn.gates, appended, mine, drawn.slots, sizes=sizes, softmax_scale=drawn.scale
            )
        )
    partials = torch.stack([step.partials for step in steps])
    return the_answer([step.combine(partials) for step in steps])


def check(drawn: Drawn, step: int, dtype: torch.dtype, device) -> None:
    parts, plain = check_step(drawn, dtype, device, partial(cut, step=step), decoded)
    _check_contents(parts, plain, drawn)


def _check_contents(parts: list[part.TokenPart], plain: Drawn, drawn: Drawn) -> None:
    """Every part has all compressed rows, and of tokens one part has a page, the others nothing of it."""

    def read(x: torch.Tensor, page: int, scale: float) -> torch.Tensor:
        return from_pages(x[page].cpu(), scale, torch.float64)

    cache, scales = plain.cache, (plain.cache.k_scale, plain.cache.v_scale) * 2
    for slot in drawn.slots[drawn.slots >= 0].tolist():
        for place in range(-(-int(cache.lengths[slot]) // drawn.sizes.slc_block_len)):
            page = int(cache.page_table[slot, place])
            assert sum(int(x.cache.page_table[slot, place]) >= 0 for x in parts) == 1
            for mine in parts:
                at = int(mine.cache.page_table[slot, place]), int(mine.cmp_table[slot, place])
                assert at[0] in (page, -1)
                for which, scale in enumerate(scales):
                    wanted = read(cache[which], page, scale)
                    if which < 2 and at[0] < 0:
                        wanted = torch.full_like(wanted, math.nan)
                    found = read(mine.cache[which], page if which < 2 else at[1], scale)
                    torch.testing.assert_close(found, wanted, rtol=7e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "dtype", "step"),
    [
        ((2, 1, 16, 16), torch.bfloat16, 2),
        pytest.param((4, 2, 16, 16), torch.bfloat16, 2, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((4, 2, 16, 16), torch.float32, 1, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((3, 1, 48, 32), torch.float16, 3, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((32, 2, 128, 128), torch.bfloat16, 4, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((16, 1, 192, 128), torch.bfloat16, 2, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 8, 64, 64), torch.bfloat16, 8, marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_mixed_lengths_and_an_empty_slot(heads, dtype, step, device):
    check(draw([190, None, 31], 1, heads, dtype=dtype), step, dtype, device)


@pytest.mark.parametrize("step", [pytest.param(step, marks=SLOW_WITHOUT_A_GPU) for step in (2, 3)])
def test_pages_in_fp8(step, device):
    drawn = draw([250, None, 31], 2, (4, 2, 16, 16)).in_fp8(0.5, 2.0)
    check(drawn, step, torch.bfloat16, device)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 4, 16, 4, 1, 2, 20), marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 16, 16, 4, 1, 1, 5), marks=SLOW_WITHOUT_A_GPU),
        pytest.param((16, 16, 64, 3, 1, 2, 64), marks=SLOW_WITHOUT_A_GPU),
    ],
    ids=["two become whole", "blocks of four pages", "no overlap"],
)
def test_other_block_lengths(sizes, device):
    check(draw([59, 3], 6, (2, 1, 16, 16), DecodeSizes(*sizes), torch.float32), 2, torch.float32, device)


@pytest.mark.parametrize("step", [pytest.param(3, marks=SLOW_WITHOUT_A_GPU)])
def test_the_choice_and_the_sums_have_one_parts_bits(step, device, monkeypatch):
    """Chunks and splits are merged as those of a cache in one piece, whatever lies where; one part's output is its."""
    monkeypatch.setattr(tiles, "TILE_CELLS", 16)
    for module in (attention, of_parts):
        monkeypatch.setattr(module, "CHUNK_BLOCKS", 4)
    drawn = draw([700, 200], 1, (2, 1, 16, 16), PAPER._replace(num_slc_blocks=4)).to(torch.bfloat16, device)
    parts, alone = (cut(drawn, count) for count in (step, 1))
    out, blocks = decoded(drawn, parts)
    one, one_blocks = decoded(drawn, alone)
    expected, expected_blocks = drawn.decode(_Decode)
    assert torch.equal(blocks, expected_blocks)
    assert torch.equal(one_blocks, expected_blocks)
    torch.testing.assert_close(one, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)


class _Decode:
    """Of a cache in one piece."""

    decode_append, decode_store = staticmethod(append.decode_append), staticmethod(append.decode_store)
    decode_attention = staticmethod(attention.decode_attention)
