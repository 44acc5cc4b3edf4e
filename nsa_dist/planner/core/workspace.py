"""Workspace of the selected branch's kernels, as `nsa_kernels.selected` allocates it: parts, items and the index."""

from nsa_dist.planner.core.sizes import Core

# nsa_kernels.selected.tiles: what parts may take, rows of a work item forward and backward, rows of a segment forward.
WORKSPACE_BYTES = 9 * 2**28
ITEM_ROWS = {True: 2048, False: 4096}
SEGMENT_ROWS = 65536


def slc_workspace_bytes(core: Core, num_kv_heads: int, forward: bool = False) -> int:
    """Of one call over `num_kv_heads` heads: a chunk's parts, gradients of the work items' pages, the inverse index."""
    rows, heads = chunk(core, num_kv_heads, forward)
    slots = core.cfg.num_slc_blocks
    entries = rows * heads * slots
    parts = rows * heads * bytes_per_query(core, forward)
    segment = min(rows, max(256, SEGMENT_ROWS // core.group)) if forward else rows
    lists = -(-rows // segment) * heads * core.plan.num_blocks
    index = lists * (-(-segment // 256)) * 36 + 4 * entries  # bits, their sums a group of 256 queries, entries
    items = entries // max(1, ITEM_ROWS[forward] // core.group) + min(lists, entries)
    pages = 0 if forward else items * core.plan.block_len * (core.heads.dim_k + core.heads.dim_v) * 4
    about_rows = 0 if forward else 4 * core.tokens * core.group * num_kv_heads * 4  # statistics, side by side
    return parts + index + 4 * items + pages + about_rows


def is_cut(core: Core) -> bool:
    """Whether backward takes the queries in several chunks, which add to sums in fp32."""
    return chunk(core, 1, forward=False)[0] < core.tokens


def chunk(core: Core, num_kv_heads: int, forward: bool) -> tuple[int, int]:
    """Queries and heads at once, as `nsa_kernels.selected.tiles.chunks` cuts them."""
    per_query = bytes_per_query(core, forward)
    if core.tokens * per_query > WORKSPACE_BYTES:
        pieces = -(-core.tokens // max(64, WORKSPACE_BYTES // per_query // 64 * 64))
        return -(-core.tokens // pieces // 64) * 64, 1
    at_once = max(1, min(num_kv_heads, WORKSPACE_BYTES // (core.tokens * per_query)))
    return core.tokens, -(-num_kv_heads // -(-num_kv_heads // at_once))


def bytes_per_query(core: Core, forward: bool) -> int:
    """Parts of one query and kv head: fp16 (fp32 for fp32) and their scales, forward also their statistics."""
    width, scales = (core.heads.dim_v, 8) if forward else (core.heads.dim_k, 4)
    part_bytes = 4 if core.heads.element_bytes >= 4 else 2
    return core.cfg.num_slc_blocks * core.group * (width * part_bytes + scales)
