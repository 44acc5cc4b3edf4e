"""Selected attention of queries that see so few blocks that all of them are chosen: the short way.

A query at position p of its document sees p // l' + 1 blocks. While they are no more than n, whatever the importances
are, it attends to every token up to its own: to one interval of keys, for which `interval` has the kernels of the
window. They keep sums in registers where the selected ones leave a part for each (query, block) pair, and there is
nothing to look up. Which queries these are depends on their places in their documents alone, so that a query's bits
stay those of its own, whatever is packed, cut or shared out around it.

Keys        rows of the rank's own k and v where they lie; or, where some are on other ranks or in pages of a cache,
            the documents' first blocks, copied side by side through the table of pages
Gradients   their dk and dv are fp32, and `backward` adds them to each page's; copied blocks' are added after it
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.tiles import copyable_by_tma
from nsa_kernels.contracts import SelectedCall, Upstream
from nsa_kernels.interval import (
    grad_kv,
    hopper_forward,
    hopper_grad_kv,
    hopper_grad_q,
    win_forward,
    win_grad_q,
)
from nsa_kernels.interval.statistics import row_statistics
from nsa_kernels.interval.tiles import KEY_TILE, SPAN_QUERIES
from nsa_kernels.interval.unseen import unseen_tiles
from nsa_kernels.selected.pages import copied_pages

WHOLE_ROWS = 128  # rows of the largest tile: where a span has a multiple of them, no tile holds two documents


class ShortPlaces(NamedTuple):
    """Which of T queries take the short way, and what they see: what `ShortRows.of` is made of, on the CPU.

    is_short    bool [T // l']          of each block of l' queries
    begin, end  int32 [T]               key rows that a query sees, neither decreasing; the others begin == end
    blocks      int32 [B] or None       global ids of the blocks that are the keys, l' rows each; None: rows of k and v
    """

    is_short: Tensor
    begin: Tensor
    end: Tensor
    blocks: Tensor | None


@dataclass(frozen=True)
class ShortRows:
    """Which queries of one call of `selected_attention` take the short way, on their device."""

    rows: slice  # that hold all of them
    others: slice  # that hold all the others
    spans: Tensor | None  # int32: the first query of every 64 of them; None: `rows` holds no others
    position: Tensor | None  # int32 [T] as the call's, -1 for them; None: `others` holds none of them
    begin: Tensor  # int32 [rows]
    end: Tensor
    unseen: Tensor  # of the keys
    blocks: Tensor | None
    num_keys: int  # whole blocks

    @classmethod
    def of(cls, places: ShortPlaces, position: Tensor) -> "ShortRows | None":
        """For queries at `position` [T], on whose device all of it is put; None if none of them is short."""
        is_short, begin, end, blocks = places
        if not bool(is_short.any()):
            return None
        device, num_queries = position.device, len(begin)
        length = num_queries // len(is_short)
        count = int(is_short.sum())
        is_first = bool(is_short[:count].all())
        num_keys = -(-int(end.max()) // length) * length
        rows = slice(0, count * length if is_first else num_queries)
        begin, end = (x[rows].to(device, torch.int32).contiguous() for x in (begin, end))
        spans = masked = None
        if not is_first:
            of_span = is_short.repeat_interleave(length)[::SPAN_QUERIES]
            spans = (of_span.nonzero().squeeze(1) * SPAN_QUERIES).to(device, torch.int32)
            masked = torch.where(is_short.repeat_interleave(length).to(device), -1, position)
        return cls(
            rows=rows,
            others=slice(rows.stop if is_first else 0, num_queries),
            spans=spans,
            position=masked,
            begin=begin,
            end=end,
            unseen=unseen_tiles(begin, end, num_keys, KEY_TILE),
            blocks=None if blocks is None else blocks.to(device, torch.int32),
            num_keys=num_keys,
        )

    @staticmethod
    def takes(slc_block_len: int) -> bool:
        """Whether blocks are whole tiles of keys and whole spans: bits then do not depend on where they lie."""
        return slc_block_len % KEY_TILE == 0 and slc_block_len % SPAN_QUERIES == 0

    def keys(self, call: SelectedCall) -> tuple[Tensor, Tensor]:
        """k and v of these queries, as the kernels of intervals read them."""
        if self.blocks is None:
            k, v = call.k[: self.num_keys], call.v[: self.num_keys]
        else:
            k, v = copied_pages(call, self.blocks)
        return copyable_by_tma(k), copyable_by_tma(v)

    def other_queries(self, call: SelectedCall) -> SelectedCall:
        """What is left for the selected kernels: rows `others` of the call."""
        position = call.position if self.position is None else self.position
        rows = self.others
        return call._replace(q=call.q[rows], block_indices=call.block_indices[rows], position=position[rows])


def attend(call: SelectedCall, short: ShortRows, out: Tensor, lse: Tensor) -> None:
    """Writes out [T, Hq, Dv] and lse [T, Hq] of these queries."""
    q, (k, v) = copyable_by_tma(call.q[short.rows]), short.keys(call)
    out, lse = out[short.rows], lse[short.rows]
    arguments = (q, k, v, short.begin, short.end, out, lse, call.softmax_scale)
    if _on_hopper(q, k, v):
        hopper_forward.attend(*arguments, key_tile=KEY_TILE, unseen=short.unseen, spans=short.spans)
    else:
        win_forward.attend(*arguments, apart=not _whole(q, k), spans=short.spans)


class ShortGradients(NamedTuple):
    """dk and dv of the keys of the short way [keys, Hkv, D], and what its dq takes."""

    dk: Tensor
    dv: Tensor
    arguments: tuple


def key_gradients(
    upstream: Upstream, call: SelectedCall, short: ShortRows, dtype: torch.dtype | None
) -> ShortGradients:
    """In fp32, to be added to; in `dtype`, None: that of k, where nothing is: all queries, and no copies."""
    is_all = short.others.start == short.others.stop and short.blocks is None
    kv_dtype = (dtype or call.k.dtype) if is_all else torch.float32
    rows = short.rows
    q, grad_out = (copyable_by_tma(x[rows]) for x in (call.q, upstream.grad_out))
    k, v = short.keys(call)
    gate = None if upstream.gate is None else upstream.gate[rows]
    statistics = row_statistics(
        upstream.softmax_lse[rows], upstream.delta[rows], gate, short.begin, short.end, k.shape[1]
    )
    arguments = (q, k, v, short.begin, short.end, statistics, grad_out, call.softmax_scale)
    if _on_hopper(q, k, v):
        grads = hopper_grad_kv.grad_kv(*arguments, kv_dtype)
    else:
        grads = grad_kv.grad_kv(*arguments, kv_dtype, apart=not _whole(q, k))
    return ShortGradients(*grads, arguments)


def query_gradients(found: ShortGradients, short: ShortRows, dq: Tensor) -> None:
    """Writes dq [T, Hq, Dk] of these queries."""
    q, k, v, begin, end, statistics, grad_out, softmax_scale = found.arguments
    dq, on_hopper = dq[short.rows], _on_hopper(q, k, v)
    into = dq if dq.dtype == q.dtype or not on_hopper else torch.empty_like(q, memory_format=torch.contiguous_format)
    if on_hopper:
        hopper_grad_q.grad_q(
            q, k, v, begin, end, statistics, grad_out, softmax_scale,
            unseen=short.unseen, spans=short.spans, into=into,
        )  # fmt: skip
    else:
        win_grad_q.grad_q(
            q, k, v, begin, end, statistics, grad_out, softmax_scale, not _whole(q, k), spans=short.spans, into=into
        )
    if into is dq:
        return
    if short.spans is None:
        dq.copy_(into)
    else:
        row = (short.spans[:, None] + torch.arange(SPAN_QUERIES, device=q.device)).flatten().long()
        dq.index_copy_(0, row, into.index_select(0, row).to(dq.dtype))


def whole_sums(grads: tuple[Tensor, Tensor], zeros: list[Tensor | None]) -> list[Tensor | None]:
    """dk, dv [keys, Hkv, D] as those of all rows of k and v, of which they are the first."""
    sums: list[Tensor | None] = []
    for total, grad in zip(zeros, grads, strict=True):
        assert total is not None  # only remote pages may be
        if len(grad) < len(total):
            total[: len(grad)] = grad
        sums.append(grad if len(grad) == len(total) else total)
    return sums


def _whole(q: Tensor, k: Tensor) -> bool:
    """Whether no tile of rows holds two documents."""
    return SPAN_QUERIES * (q.shape[1] // k.shape[1]) % WHOLE_ROWS == 0


def _on_hopper(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return _whole(q, k) and hopper_takes(q, k) and v.shape[2] in (64, 128)
