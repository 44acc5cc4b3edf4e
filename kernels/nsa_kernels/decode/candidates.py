"""The best blocks of each chunk of a sequence, by importances that are now whole.

    imp[t, h, j] = sum_g 2 ** -lse[t, g] * sum_layer 2 ** tile_max * imp[g, layer, j + layer]

lse, in powers of 2, is merged over the splits in ascending order. A chunk's candidates are its n best blocks: of the
best n of all, none lies outside of them. An int64 a block, its key, orders them, the bits of its importance above those
of ~j: larger importance first, then the lower index; forced blocks have more than any.

Shapes      n_pad = the power of two from n on
    candidates      keys, int64 [B, new, Hkv, chunks, n_pad], descending, -1 for none; of chunks that a token sees
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 9 to 12
"""

import triton
import triton.language as tl

from nsa_kernels.decode.append import num_whole
from nsa_kernels.selection.top import merge_sorted

FAR = tl.constexpr(2**31 - 1)
INFINITY_BITS = tl.constexpr(0x7F800000)  # of fp32: more than any importance


@triton.jit
def merged_lse(
    max_ptr, sum_ptr, state, live, num_used, ROWS: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr
):
    """log2 of the softmax's sum of rows [ROWS] over the splits that are used, in ascending order; -inf: none is."""
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, NUM_SPLITS, SPLITS):
        split = first + tl.arange(0, SPLITS)
        used = live[:, None] & (split < num_used)[None, :]
        part = (state * NUM_SPLITS)[:, None] + split[None, :]
        part_max = tl.load(max_ptr + part, mask=used, other=float("-inf"))
        part_sum = tl.load(sum_ptr + part, mask=used, other=0.0)
        m_new = tl.maximum(m, tl.max(part_max, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2(m - base) + tl.sum(tl.exp2(part_max - base[:, None]) * part_sum, 1)
        m = m_new
    return tl.where(total > 0, m + tl.log2(total), float("-inf"))


@triton.jit
def _maxima(tile_max_ptr, state, live, tile, num_tiles, num_used):
    """[rows, tiles]: -inf for tiles that are not used."""
    used = live[:, None] & (tile < num_used)[None, :]
    return tl.load(tile_max_ptr + (state * num_tiles)[:, None] + tile[None, :], mask=used, other=float("-inf"))


@triton.jit
def keys_of(block, importance, own, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr):
    """int64 of blocks and their fp32 importance, of the shape of both; -1 behind the query's own block."""
    forced = (block < NUM_INIT) | (block > own - NUM_LOCAL)
    bits = tl.where(forced, INFINITY_BITS, importance.to(tl.int32, bitcast=True))
    return tl.where(block <= own, (bits.to(tl.int64) << 32) | (block ^ FAR).to(tl.int64), -1)


@triton.jit
def first_keys(candidates_ptr, room, CANDIDATES: tl.constexpr, ROWS: tl.constexpr):
    """Of `room` keys in a row those that `best_of` takes first, [ROWS, CANDIDATES]."""
    index = tl.arange(0, ROWS)[:, None] * CANDIDATES + tl.arange(0, CANDIDATES)[None, :]
    return tl.load(candidates_ptr + index, mask=index < room, other=-1)


@triton.jit
def best_of(keys, candidates_ptr, count, CHOSEN_PAD: tl.constexpr, CANDIDATES: tl.constexpr, ROWS: tl.constexpr):
    """The best CHOSEN_PAD of `count` keys in a row, descending, -1 for none: [1, CHOSEN_PAD].

    Rows of CANDIDATES are sorted side by side, a warp each. keys: `first_keys`, of which more than `count` may be read
    before it is known.
    """
    index = tl.arange(0, ROWS)[:, None] * CANDIDATES + tl.arange(0, CANDIDATES)[None, :]
    best = _best_of_rows(tl.where(index < count, keys, -1), CHOSEN_PAD, ROWS)
    for first in tl.range(ROWS * CANDIDATES, count, ROWS * CANDIDATES):
        keys = first_keys(candidates_ptr + first, count - first, CANDIDATES, ROWS)
        best = merge_sorted(best, _best_of_rows(keys, CHOSEN_PAD, ROWS))
    return best


@triton.jit
def _best_of_rows(keys, CHOSEN_PAD: tl.constexpr, ROWS: tl.constexpr):
    best = tl.topk(keys, CHOSEN_PAD)
    if ROWS > 1:
        best = tl.topk(tl.reshape(best, [1, ROWS * CHOSEN_PAD]), CHOSEN_PAD)
    return best


@triton.jit
def ids_of(keys, NUM_CHOSEN: tl.constexpr):
    """Blocks [1, N] of the first NUM_CHOSEN keys [1, N], ascending, FAR behind them and for none."""
    rank = tl.arange(0, keys.shape[1])[None, :]
    return tl.sort(tl.where((keys >= 0) & (rank < NUM_CHOSEN), (keys & FAR).to(tl.int32) ^ FAR, FAR))


@triton.jit
def chunk_candidates(
    max_ptr, sum_ptr, imp_ptr, tile_max_ptr, candidates_ptr,
    chunk, query, head, batch, token, end, own, new, num_heads, num_tiles, num_chunks,
    G: tl.constexpr, G_PAD: tl.constexpr, CMP_LEN: tl.constexpr, CMP_STRIDE: tl.constexpr,
    CELLS_CMP: tl.constexpr, CELLS_SLC: tl.constexpr, NUM_LAYERS: tl.constexpr,
    NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_PAGES: tl.constexpr,
    TILE_PAGES: tl.constexpr, CHUNK_TILES: tl.constexpr, NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
):  # fmt: skip
    """A chunk: CHUNK_TILES tiles of pages, of which each row's importances have one scale. `own`: the query's block."""
    num_cells = tl.where(end >= CMP_LEN, num_whole(end, CMP_LEN, CMP_STRIDE) + CELLS_CMP - 1, 0)
    num_pages = tl.cdiv(num_cells, CELLS_SLC)
    num_used = tl.cdiv(num_pages, TILE_PAGES)
    g = tl.arange(0, G_PAD)
    live = g < G
    state = (batch * num_heads + head) * (new * G) + token * G + g
    tile = chunk * CHUNK_TILES + tl.arange(0, CHUNK_TILES)
    column = tl.arange(0, TILE_PAGES)
    block = tile[:, None] * TILE_PAGES + column[None, :]  # [CHUNK_TILES, TILE_PAGES]
    imp_pages = num_tiles * TILE_PAGES
    imp_rows = imp_ptr + (state * NUM_LAYERS * imp_pages)[:, None, None]
    lse = merged_lse(max_ptr, sum_ptr, state, live, tl.cdiv(num_pages, SPLIT_PAGES), G_PAD, NUM_SPLITS, SPLITS)
    lse = tl.where(lse > float("-inf"), lse, float("inf"))
    imp = tl.zeros([G_PAD, CHUNK_TILES, TILE_PAGES], tl.float32)
    for layer in tl.static_range(NUM_LAYERS):
        there = live[:, None, None] & (block + layer < num_pages)[None, :, :]
        share = tl.load(imp_rows + (block + layer * (imp_pages + 1))[None, :, :], mask=there, other=0.0)
        # Page block + layer is in the tile that is layer // TILE_PAGES tiles on, or in the one after it.
        first = tile + layer // TILE_PAGES
        m = _maxima(tile_max_ptr, state, live, first, num_tiles, num_used)
        scale = tl.exp2(m - lse[:, None])[:, :, None]
        if layer % TILE_PAGES > 0:
            m = _maxima(tile_max_ptr, state, live, first + 1, num_tiles, num_used)
            crosses = (column + layer % TILE_PAGES >= TILE_PAGES)[None, None, :]
            scale = tl.where(crosses, tl.exp2(m - lse[:, None])[:, :, None], scale)
        imp += scale * share
    total = tl.sum(imp, 0)
    key = keys_of(block, total, own, NUM_INIT, NUM_LOCAL)
    best = tl.topk(tl.reshape(key, [1, CHUNK_TILES * TILE_PAGES]), CHOSEN_PAD)
    to = candidates_ptr + ((query * num_heads + head) * num_chunks + chunk) * CHOSEN_PAD
    tl.store(to + tl.arange(0, CHOSEN_PAD)[None, :], best)
