"""Decoding from a cache in parts, all of them in this process, against the fp64 reference of the whole cache."""

import math
from functools import partial

import pytest
import torch

from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.paged import PAPER, Drawn, draw
from kernels.parts import check_step, the_answer
from nsa_kernels.decode import append, tiles
from nsa_kernels.decode_contracts import DecodeSizes
from nsa_kernels.decode_part import attention, candidates, part, store


def cut(drawn: Drawn, step: int) -> list[part.CachePart]:
    """Every part has the pool's shape, and NaN in the pages of the others; sequences begin on different ones."""
    cache, sizes = drawn.cache, drawn.sizes
    count, parts = part.cells_following(sizes), []
    slots = torch.arange(len(cache.lengths), device=cache.lengths.device)
    pages = torch.arange(cache.page_table.shape[1], device=slots.device)
    for index in range(step):
        here = (pages + slots[:, None]) % step == index
        exists = cache.page_table < len(cache.k_slc)
        pools = [torch.full_like(x, math.nan) for x in cache[:4]]
        own = cache.page_table[here & exists].long()
        for pool, x in zip(pools, cache[:4], strict=True):
            pool[own] = x[own]
        after = torch.zeros_like(here)
        after[:, 1:] = here[:, :-1]
        following = torch.full_like(cache.k_cmp[:, :count], math.nan)
        kept = cache.page_table[after & exists].long()
        following[kept] = cache.k_cmp[kept, :count]
        table, behind = (torch.where(x, cache.page_table, -1) for x in (here, after))
        rest = [x.clone() for x in cache[4:8]]
        tensors = [*pools, *rest, table, cache.lengths.clone()]
        mine = cache._replace(**dict(zip(cache._fields[: len(tensors)], tensors, strict=True)))
        first = ((index - slots) % step).to(torch.int32)
        parts.append(part.CachePart(mine, first, following, behind, step))
    return parts


def decoded(drawn: Drawn, parts: list[part.CachePart], compare: bool = True):
    """out and blocks, which are the same for every part."""
    sizes, new, steps = drawn.sizes, drawn.q.shape[1], []
    for mine in parts:
        appended = append.decode_append(*drawn.new, mine.cache, drawn.slots, sizes=sizes)
        means = [x.unflatten(0, (-1, sizes.cmp_block_len)).mean(1) for x in (appended.k_raw, appended.v_raw)]
        store.part_store(*means, appended, mine, drawn.slots, new, sizes=sizes)
        scale = drawn.scale
        steps.append(
            attention.PartAttention(drawn.q, drawn.gates, appended, mine, drawn.slots, sizes=sizes, softmax_scale=scale)
        )
    lses = torch.stack([step.lse for step in steps])
    best = torch.stack([step.candidates(lses) for step in steps])
    partials = torch.stack([step.attend(best) for step in steps])
    return the_answer([step.combine(partials) for step in steps], compare)


def check(drawn: Drawn, step: int, dtype: torch.dtype, device) -> None:
    parts, plain = check_step(drawn, dtype, device, partial(cut, step=step), decoded)
    _check_contents(parts, plain, drawn)


def _check_contents(parts: list[part.CachePart], plain: Drawn, drawn: Drawn) -> None:
    """Of every page one part has all, and no other one anything."""
    cache, count = plain.cache, part.cells_following(drawn.sizes)
    for slot in drawn.slots[drawn.slots >= 0].tolist():
        for place in range(-(-int(cache.lengths[slot]) // drawn.sizes.slc_block_len)):
            page = int(cache.page_table[slot, place])
            owners = [x for x in parts if int(x.cache.page_table[slot, place]) >= 0]
            assert len(owners) == 1
            for x in parts:
                for held, wanted in zip(x.cache[:4], cache[:4], strict=True):
                    wanted = wanted[page] if x is owners[0] else torch.full_like(wanted[page], math.nan)
                    torch.testing.assert_close(held[page].cpu(), wanted, rtol=1e-2, atol=1e-2, equal_nan=True)
                if place and count and int(x.cache.page_table[slot, place - 1]) >= 0:
                    found = x.following[page].cpu()
                    torch.testing.assert_close(found, cache.k_cmp[page, :count], rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize(
    ("heads", "dtype", "step"),
    [
        ((4, 2, 16, 16), torch.bfloat16, 2),
        pytest.param((4, 2, 16, 16), torch.float32, 1, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((3, 1, 48, 32), torch.float16, 2, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 1, 16, 16), torch.bfloat16, 4, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((32, 2, 128, 128), torch.bfloat16, 4, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((16, 1, 192, 128), torch.bfloat16, 2, marks=SLOW_WITHOUT_A_GPU),
        pytest.param((64, 8, 64, 64), torch.bfloat16, 8, marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_mixed_lengths_and_an_empty_slot(heads, dtype, step, device):
    check(draw([250, None, 31], 1, heads, dtype=dtype), step, dtype, device)


@pytest.mark.parametrize(
    "sizes",
    [
        (8, 4, 16, 4, 1, 2, 20),
        pytest.param((64, 16, 64, 4, 1, 1, 5), marks=SLOW_WITHOUT_A_GPU),
        pytest.param((16, 16, 64, 3, 1, 2, 64), marks=SLOW_WITHOUT_A_GPU),
        pytest.param((32, 16, 16, 2, 0, 1, 1), marks=SLOW_WITHOUT_A_GPU),
    ],
    ids=["two become whole", "three keys follow", "no overlap", "one cell a page"],
)
def test_other_block_lengths(sizes, device):
    check(draw([59, 3], 6, (2, 1, 16, 16), DecodeSizes(*sizes), torch.float32), 2, torch.float32, device)


def test_splits_and_chunks_are_merged(device, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_CELLS", 16)
    monkeypatch.setattr(tiles, "ENOUGH_SPLITS", 10**6)
    monkeypatch.setattr(attention, "CHUNK_BLOCKS", 4)
    monkeypatch.setattr(candidates, "CANDIDATES", 16)
    sizes = PAPER._replace(num_slc_blocks=4)
    check(draw([1300, 200], 1, (2, 1, 16, 16), sizes), 2, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_stays_valid_while_sequences_grow(device):
    drawn = draw([620, None, 0, 30], 1, (4, 2, 16, 16), max_pages=20).to(torch.bfloat16, device)
    eager, parts = cut(drawn, 3), cut(drawn, 3)
    expected = [[x.clone() for x in decoded(drawn, eager)] for _ in range(4)]
    lengths = [x.cache.lengths.clone() for x in parts]

    def back():
        for x, before in zip(parts, lengths, strict=True):
            x.cache.lengths.copy_(before)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoded(drawn, parts)
    torch.cuda.current_stream().wait_stream(side)
    back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decoded(drawn, parts, compare=False)
    for answers in expected:
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, answers, strict=True))


def test_what_the_kernels_take():
    assert attention.part_takes(torch.bfloat16, 128, 128, PAPER)
    assert attention.part_takes(torch.bfloat16, 192, 128, PAPER._replace(cmp_block_len=80))
    assert not attention.part_takes(torch.bfloat16, 192, 128, PAPER._replace(cmp_block_len=96))
    assert not attention.part_takes(torch.float64, 128, 128, PAPER)
