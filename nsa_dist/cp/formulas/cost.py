"""What a plan sends, in closed form: bytes by kind that equal those `comm.Traffic` counts, without moving any.

All functions work on segments and documents, never on tokens, so a plan over millions of tokens costs microseconds.
The bytes are those of one layer and one sequence. P = cp_size, row = Hkv * (Dk + Dv) numbers, e = bytes of a number,
g = bytes of a number of a gradient in flight (fp32 or better):

    kind              one rank sends
    halo              rows of its segments that stand left of others' * row * e, for k_cmp v_cmp and for k_win v_win
    halo.grad         rows it received * row * g
    compressed        (P - 1) * M_max * row * e               M_max: compressed blocks of the rank that owns most
    compressed.grad   (P - 1) * M_max * row * g
    bitmap            (P - 1) * Hkv * ceil(num_blocks / 8), twice where one kv head's queries go in two halves
    pages             pages others fetch from it * l' * (Dk + Dv) * e, twice if backward fetches them again
    pages.grad        pages it fetched * l' * (Dk + Dv) * g
    pages.inside      where ranks form domains, pages that it passes on to neighbours, as pages; gradients likewise

Where ranks read each other's memory (`one_sided`) `pages` are what a rank reads, over all ranks the same; instead of
bitmaps it reads a byte for each of its blocks and each other rank.

The alternatives (`whole_sequence_bytes`) move raw K/V instead of pages: an all-gather, a ring and a stream of whole
shards differ in memory and in the number of messages, not in bytes.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.fetch import widen_to_whole_shards
from nsa_dist.cp.plan import ShardPlan

# counts[r][q]: what rank r receives from rank q; the diagonal is 0.
Matrix = list[list[int]]


@dataclass(frozen=True)
class HeadSizes:
    """The heads of one layer on one rank (tensor parallelism already divided), and how wide their numbers are."""

    num_q_heads: int
    num_kv_heads: int
    dim_k: int
    dim_v: int
    element_bytes: int = 2

    @property
    def grad_bytes(self) -> int:
        """Bytes of a number of a gradient on the wire: fp32, or fp64 for fp64."""
        return max(4, self.element_bytes)

    @property
    def row_elements(self) -> int:
        """Numbers of one token's K and V over all key/value heads."""
        return self.num_kv_heads * (self.dim_k + self.dim_v)


@dataclass(frozen=True)
class Piece:
    """Consecutive real tokens of one document on one rank, `[start, stop)` counted from the document's first."""

    document: int
    start: int
    stop: int


def pieces(plan: ShardPlan, rank: int) -> list[Piece]:
    """The documents of a rank's segments, padding left out."""
    found = []
    for segment in plan.segments(rank):
        document = bisect_right(plan.stream_starts, segment.start) - 1
        while document < plan.num_documents and plan.stream_starts[document] < segment.stop:
            first = plan.stream_starts[document]
            length = plan.cu_seqlens[document + 1] - plan.cu_seqlens[document]
            start, stop = max(0, segment.start - first), min(length, segment.stop - first)
            if start < stop:
                found.append(Piece(document, start, stop))
            document += 1
    return found


# --- Halo ---------------------------------------------------------------------------------------------------------


def halo_rows(plan: ShardPlan, halo_len: int) -> Matrix:
    """Rows that rank r receives from rank q so that every segment has `halo_len` tokens of its document before it.

    The halos of two segments may overlap; a row in both travels twice.
    """

    def compute() -> Matrix:
        held = sorted((s.start, s.stop, rank) for rank in range(plan.cp_size) for s in plan.segments(rank))
        starts = [start for start, _, _ in held]
        received = [[0] * plan.cp_size for _ in range(plan.cp_size)]
        for rank, row in enumerate(received):
            for a, b in _halo_intervals(plan, rank, halo_len):
                for start, stop, source in held[bisect_right(starts, a) - 1 : bisect_left(starts, b)]:
                    row[source] += (source != rank) * (min(b, stop) - max(a, start))
        return received

    return plan.memo(("halo_rows", halo_len), compute)


def _halo_intervals(plan: ShardPlan, rank: int, halo_len: int) -> list[tuple[int, int]]:
    """Stream positions before each segment that are in its first token's document; none before padding."""
    intervals = []
    for segment in plan.segments(rank):
        document = min(bisect_right(plan.stream_starts, segment.start), plan.num_documents) - 1
        offset = segment.start - plan.stream_starts[document]
        if offset < plan.cu_seqlens[document + 1] - plan.cu_seqlens[document]:
            intervals.append((segment.start - min(halo_len, offset), segment.start))
    return intervals


def halo_lengths(cfg: NSAConfig) -> tuple[int, int]:
    """Tokens left of a segment that the compressed blocks and the window reach; the window's are whole blocks."""
    return cfg.cmp_block_len - cfg.cmp_stride, -(-(cfg.window_len - 1) // cfg.slc_block_len) * cfg.slc_block_len


# --- Compressed K/V -----------------------------------------------------------------------------------------------


def own_cmp_blocks(plan: ShardPlan, cfg: NSAConfig, rank: int) -> int:
    """Compressed blocks whose last token `rank` holds."""
    return plan.memo(
        ("own_cmp_blocks", cfg, rank),
        lambda: sum(cfg.num_cmp_blocks(p.stop) - cfg.num_cmp_blocks(p.start) for p in pieces(plan, rank)),
    )


def total_cmp_blocks(plan: ShardPlan, cfg: NSAConfig) -> int:
    """M, of the whole sequence."""
    return sum(cfg.num_cmp_blocks(b - a) for a, b in pairwise(plan.cu_seqlens))


# --- Pages --------------------------------------------------------------------------------------------------------


def visible_remote_blocks(plan: ShardPlan) -> Matrix:
    """Selection blocks that rank q holds and some query of rank r may choose: the most that r can fetch for a head."""
    return plan.memo(
        ("visible_remote_blocks",),
        lambda: [_held_by(plan, rank, _visible_blocks(plan, [rank]), plan.block_len) for rank in range(plan.cp_size)],
    )


def seen_blocks(plan: ShardPlan, ranks: Iterable[int]) -> list[int]:
    """Selection blocks that each rank holds and some query of `ranks` may choose."""
    return _held_by(plan, -1, _visible_blocks(plan, ranks), plan.block_len)


def _visible_blocks(plan: ShardPlan, ranks: Iterable[int]) -> list[tuple[int, int]]:
    """Intervals of stream blocks up to the last query of each document on these ranks."""
    last: dict[int, int] = {}
    for rank in ranks:
        for piece in pieces(plan, rank):
            last[piece.document] = max(piece.stop, last.get(piece.document, 0))
    firsts = {document: plan.stream_starts[document] // plan.block_len for document in last}
    return [(firsts[d], firsts[d] - (-stop // plan.block_len)) for d, stop in sorted(last.items())]


def chosen_at(plan: ShardPlan, union_fraction: float) -> list[list[float]]:
    """Blocks of each rank q that rank r chose for a head when it chose the fraction u of the remote blocks.

    u is counted as `Traffic.union_fractions` counts it: blocks after a rank's last query are remote blocks, too, so
    the most that a rank can choose is less than 1; a larger u means all it can see. ValueError unless 0 <= u <= 1.
    """
    if not 0 <= union_fraction <= 1:
        raise ValueError(
            f"union_fraction={union_fraction} must lie between 0 and 1, because it is the share of the remote blocks "
            f"that some query chose; pass 1 for the worst case"
        )
    num_remote = plan.num_blocks - plan.tokens_per_rank // plan.block_len
    found = []
    for row in visible_remote_blocks(plan):
        share = min(1.0, union_fraction * num_remote / max(1, sum(row)))
        found.append([share * blocks for blocks in row])
    return found


def pages_at(plan: ShardPlan, heads: HeadSizes, union_fraction: float) -> Matrix:
    """Pages fetched when every rank's queries choose the fraction u (`chosen_at`), for every head alike."""
    return [[round(blocks) * heads.num_kv_heads for blocks in row] for row in chosen_at(plan, union_fraction)]


def pages_of(plan: ShardPlan, block_indices: Sequence[Tensor], whole_shard_fraction: float = 1.0) -> Matrix:
    """Pages fetched for given choices: every rank's `block_indices` as `nsa_attention` returns them.

    whole_shard_fraction    as in `FetchOptions`: from this share of an owner's blocks of a head on all of them travel
    """
    return widen_to_whole_shards(wanted_blocks(plan, block_indices), whole_shard_fraction).sum((2, 3)).tolist()


def wanted_blocks(plan: ShardPlan, block_indices: Sequence[Tensor]) -> Tensor:
    """bool [P, P, Hkv, T // l']: the blocks that each rank's queries chose of each other rank's."""
    owner, _ = plan.owner(torch.arange(plan.num_blocks) * plan.block_len)
    stream_block = _stream_blocks(plan)
    wanted = torch.zeros(plan.cp_size, block_indices[0].shape[1], plan.num_blocks, dtype=torch.bool)
    for rank, ids in enumerate(block_indices):
        for head in range(ids.shape[1]):
            chosen = ids[:, head].unique().long().cpu()
            wanted[rank, head, stream_block[chosen[chosen >= 0]]] = True
        wanted[rank][:, owner == rank] = False
    return wanted[..., owner.argsort(stable=True)].unflatten(-1, (plan.cp_size, -1)).transpose(1, 2)


def _stream_blocks(plan: ShardPlan) -> Tensor:
    """For each block id that callers see its block in the plan's own stream, int64 [num_blocks]."""
    blocks = torch.arange(plan.num_blocks)
    if plan.block_ids is None:
        return blocks
    real = plan.block_ids >= 0
    return torch.empty_like(blocks).index_copy_(0, plan.block_ids[real], blocks[real])


# --- Bytes --------------------------------------------------------------------------------------------------------


def sent_bytes(
    plan: ShardPlan, cfg: NSAConfig, heads: HeadSizes, pages: Matrix, *, refetch: bool, halves: bool = False,
    one_sided: bool = False, inside: Matrix | None = None,
) -> list[dict[str, int]]:  # fmt: skip
    """What each rank sends in one forward and backward of one layer, by kind, as `Traffic.sent_bytes` counts it.

    pages       from `pages_of` or `pages_at`
    refetch     backward fetches the pages again instead of keeping them
    halves      `FetchOptions.halves_queries`
    one_sided   ranks read each other's pages: `pages` are what a rank reads, and in backward it reads which of its own
                blocks others chose, a byte each
    inside      where ranks form domains: pages passed on in them, and `pages` are those between (`formulas.domains`)
    A group of one sends nothing. The check of the layouts (kind `layout`, once per shape) is not in it.
    """
    others, page = plan.cp_size - 1, plan.block_len * (heads.dim_k + heads.dim_v)
    bits = (2 if halves else 1) * -(-plan.num_blocks // 8)
    if one_sided:
        bits = plan.tokens_per_rank // plan.block_len
    row_bytes, row_grad_bytes = heads.row_elements * heads.element_bytes, heads.row_elements * heads.grad_bytes
    halos = [halo_rows(plan, length) for length in halo_lengths(cfg)]
    most = max(own_cmp_blocks(plan, cfg, rank) for rank in range(plan.cp_size))

    def of_pages(counts: Matrix, suffix: str = "") -> list[dict[str, int]]:
        """Of pages that others get from a rank; one-sided, that it gets from others."""
        got = [sum(row) for row in counts]
        return [
            {
                f"pages{suffix}": (2 if refetch else 1) * moved * page * heads.element_bytes,
                f"pages.grad{suffix}": found * page * heads.grad_bytes,
            }
            for moved, found in zip(got if one_sided else map(sum, zip(*counts, strict=True)), got, strict=True)
        ]

    halos_sent = [sum(rows) for rows in zip(*(map(sum, zip(*halo, strict=True)) for halo in halos), strict=True)]
    moved = of_pages(pages)
    passed_on: list[dict[str, int]] = [{} for _ in moved] if inside is None else of_pages(inside, ".inside")
    return [
        {
            "halo": halos_sent[rank] * row_bytes,
            "halo.grad": sum(sum(halo[rank]) for halo in halos) * row_grad_bytes,
            "compressed": others * most * row_bytes,
            "compressed.grad": others * most * row_grad_bytes,
            "bitmap": others * heads.num_kv_heads * bits,
            **moved[rank],
            **passed_on[rank],
        }
        for rank in range(plan.cp_size)
    ]


def sequence_kv_bytes(plan: ShardPlan, heads: HeadSizes) -> int:
    """S: one branch's K and V of the whole padded sequence, one layer."""
    return plan.cp_size * plan.tokens_per_rank * heads.row_elements * heads.element_bytes


def whole_sequence_bytes(plan: ShardPlan, heads: HeadSizes) -> dict[str, int]:
    """What every rank sends when all of S moves: by all-gather, around a ring, or as a stream of whole shards.

    Forward S * (P - 1) / P. Backward the same again, since nobody keeps S, and dK/dV as g / e times that: with bf16
    numbers and fp32 gradients 3 * S * (P - 1) / P in all.
    """
    shard = plan.tokens_per_rank * heads.row_elements
    others = plan.cp_size - 1
    return {
        "pages": 2 * others * shard * heads.element_bytes,
        "pages.grad": others * shard * heads.grad_bytes,
    }


def layout_check_bytes(plan: ShardPlan) -> int:
    """Sent once per shape, so that ranks that disagree raise: two int64 to every other rank."""
    return (plan.cp_size - 1) * 16


# --- Intervals of the stream --------------------------------------------------------------------------------------


def _held_by(plan: ShardPlan, rank: int, intervals: Sequence[tuple[int, int]], unit: int = 1) -> list[int]:
    """How much of `intervals` each other rank holds; in units of `unit` stream positions. Intervals are disjoint."""
    ordered = sorted(intervals)
    starts = [a for a, _ in ordered]
    before = [0, *accumulate(b - a for a, b in ordered)]

    def below(x: int) -> int:
        """Length of the intervals left of x."""
        i = bisect_right(starts, x)
        if i == 0:
            return 0
        a, b = ordered[i - 1]
        return before[i - 1] + min(b, x) - a

    return [
        0 if source == rank else sum(below(s.stop // unit) - below(s.start // unit) for s in plan.segments(source))
        for source in range(plan.cp_size)
    ]
