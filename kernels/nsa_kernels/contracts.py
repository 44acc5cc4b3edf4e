"""How the attention functions are called: parameters, shapes and what does not fit, written once.

`nsa_kernels` (Triton), `nsa_kernels.cpu` and `nsa_kernels.reference` hold the same functions under the same names. Each
is a function of what its contract makes of the arguments, and takes its signature and docstring from there:

    @meets(contracts.interval_attention)
    def compressed_attention(call: IntervalCall) -> tuple[Tensor, Tensor]: ...

Contracts  `interval_attention` of compressed_attention and window_attention, `selected_attention`, `select_blocks`;
           with `_backward` those of their gradients
Names      T = query tokens here, R = key rows here, M = compressed blocks of the whole sequence, Hq / Hkv = query /
           key-value heads, G = Hq // Hkv, Dk / Dv = head dims of q, k / v, l / d / l' = cmp_block_len / cmp_stride /
           slc_block_len, n = num_slc_blocks. Query heads h*G .. h*G+G-1 share key-value head h.
Positions  `position[t]` is a token's place in the stream in which every document is padded to whole selection blocks,
           so `position // l'` is its global selection block; -1 marks a padding row, which sees nothing.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class IntervalCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    begin: Tensor
    end: Tensor
    softmax_scale: float


class SelectedCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    k_remote: Tensor | None
    v_remote: Tensor | None
    block_indices: Tensor
    block_table: Tensor
    position: Tensor
    slc_block_len: int
    softmax_scale: float


class SelectionCall(NamedTuple):
    q: Tensor
    k_cmp: Tensor
    lse_cmp: Tensor
    cmp_begin: Tensor
    cmp_end: Tensor
    position: Tensor
    doc_start: Tensor
    softmax_scale: float
    cmp_block_len: int
    cmp_stride: int
    slc_block_len: int
    num_slc_blocks: int
    num_init_blocks: int
    num_local_blocks: int


class Upstream(NamedTuple):
    """What comes from above: of all the keys of a query, of which those of the call may be a part."""

    grad_out: Tensor
    gate: Tensor | None
    delta: Tensor
    softmax_lse: Tensor

    def of_heads(self, heads: slice) -> "Upstream":
        gate = None if self.gate is None else self.gate[:, heads]
        return Upstream(self.grad_out[:, heads], gate, self.delta[:, heads], self.softmax_lse[:, heads])


def meets(contract: Callable[P, tuple]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Make of a function of what `contract` returns the function that is called as the contract says.

    Its keyword-only parameters, which have defaults, are options of this implementation alone; its docstring speaks of
    them.
    """

    def decorate(run: Callable[..., R]) -> Callable[P, R]:
        options = [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]
        names = frozenset(option.name for option in options)

        @wraps(run)
        def operator(*args: P.args, **kwargs: P.kwargs) -> R:
            own: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
            return run(*contract(*args, **kwargs), **own)

        shared = inspect.signature(contract)
        signature = inspect.signature(run).replace(parameters=[*shared.parameters.values(), *options])
        operator.__signature__ = signature  # type: ignore[attr-defined]
        operator.__doc__ = "\n\n".join(inspect.cleandoc(text) for text in (contract.__doc__, run.__doc__) if text)
        return operator

    return decorate


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *, softmax_scale: float
) -> tuple[IntervalCall]:
    """Attention of every query to the rows `[begin[t], end[t])` of k and v: (out, softmax_lse).

    compressed_attention: the rows are the compressed blocks that the query may see (section 3.3.1). window_attention:
    the tokens of its window (section 3.3.3); they may begin before the first query, a halo from another rank.

    q           [T, Hq, Dk]
    k, v        [R, Hkv, Dk], [R, Hkv, Dv]      of cmp, R = M
    begin, end  int32 [T]       neither decreases; begin == end: the query sees nothing
    returns     out [T, Hq, Dv] in the dtype of q, softmax_lse [T, Hq], natural log, fp32 (fp64 for fp64); a row that
                sees no key is (0, -inf)
    raises      ValueError on shapes that do not fit together
    """
    _check_heads(q, k, v)
    _check_bounds(q, begin, end)
    return (IntervalCall(q, k, v, begin, end, softmax_scale),)


def interval_attention_backward(
    grad_out: Tensor,
    gate: Tensor | None,
    delta: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    softmax_scale: float,
    kv_dtype: torch.dtype | None = None,
) -> tuple[Upstream, IntervalCall, torch.dtype | None]:
    """Gradients of `gate * out`, where these rows may be only a part of what a query attended to: (dq, dk, dv).

    grad_out    [T, Hq, Dv]     of `gate * out`, or of a sum that it is a term of
    gate        [T, Hq]         of either sign; None: ones
    delta       [T, Hq]         rowsum(grad_out * out), of the whole `out` without its gate, fp32 (fp64 for fp64)
    softmax_lse [T, Hq]         as the forward returned it, of the whole; the four of any strides
    kv_dtype                    of dk and dv; None: those of k and v
    others                      as in the forward
    returns     dq [T, Hq, Dk], dk [R, Hkv, Dk], dv [R, Hkv, Dv]
    raises      ValueError on shapes that do not fit together
    """
    (call,) = interval_attention(q, k, v, begin, end, softmax_scale=softmax_scale)
    return _upstream(grad_out, gate, delta, softmax_lse, q, v), call, kv_dtype


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_table: Tensor,
    position: Tensor,
    *,
    slc_block_len: int,
    softmax_scale: float,
    k_remote: Tensor | None = None,
    v_remote: Tensor | None = None,
) -> tuple[SelectedCall]:
    """Attention of every query to its selected blocks, causal inside its own (section 3.3.2): (out, softmax_lse).

    q               [T, Hq, Dk]
    k, v            [R, Hkv, Dk], [R, Hkv, Dv]  whole blocks: page p is rows p*l' .. (p+1)*l'
    block_indices   int32 [T, Hkv, n]           global block ids, ascending and distinct, -1 (last) for none
    block_table     int32 [Hkv, num_blocks]     global block id -> page; pages from R // l' on are remote ones
    position        integer [T]                 place of each query in the padded stream; -1: padding
    k_remote, v_remote  [pages, l', Dk], [pages, l', Dv]    pages from other ranks, each of one key-value head
    returns     out [T, Hq, Dv] in the dtype of q, softmax_lse [T, Hq], as `interval_attention`
    raises      ValueError on shapes that do not fit together
    """
    _check_heads(q, k, v)
    _check_chosen(q, k, block_indices, block_table, position)
    _check_remote(q, v, slc_block_len, k_remote, v_remote)
    pages = (k, v, k_remote, v_remote)
    return (SelectedCall(q, *pages, block_indices, block_table, position, slc_block_len, softmax_scale),)


def selected_attention_backward(
    grad_out: Tensor,
    gate: Tensor | None,
    delta: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_table: Tensor,
    position: Tensor,
    *,
    slc_block_len: int,
    softmax_scale: float,
    k_remote: Tensor | None = None,
    v_remote: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Upstream, SelectedCall, torch.dtype | None]:
    """Gradients of `gate * out`, where these blocks may be only a part of what a query attended to.

    grad_out, gate, delta, softmax_lse      as in `interval_attention_backward`
    dtype       of the gradients; None: each in that of its tensor
    others      as in the forward
    returns     dq, dk, dv, dk_remote, dv_remote, shaped like q, k, ..; the last two None without remote pages
    raises      ValueError on shapes that do not fit together
    """
    (call,) = selected_attention(
        q, k, v, block_indices, block_table, position,
        slc_block_len=slc_block_len, softmax_scale=softmax_scale, k_remote=k_remote, v_remote=v_remote,
    )  # fmt: skip
    return _upstream(grad_out, gate, delta, softmax_lse, q, v), call, dtype


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse_cmp: Tensor,
    cmp_begin: Tensor,
    cmp_end: Tensor,
    position: Tensor,
    doc_start: Tensor,
    *,
    softmax_scale: float,
    cmp_block_len: int,
    cmp_stride: int,
    slc_block_len: int,
    num_slc_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
) -> tuple[SelectionCall]:
    """The n selection blocks of every query and key-value head, forced ones included, ascending, -1 for none.

    Importance is eq. 9 over the compressed probabilities, summed over the G heads of the group (eq. 10). Forced: the
    document's first `num_init_blocks` and the last `num_local_blocks` up to the query's own. Among the others larger
    importance wins, ties go to the lower index. No gradient passes.

    q, k_cmp, cmp_begin, cmp_end    as `interval_attention`, lse_cmp [T, Hq] its softmax_lse
    position, doc_start             integer [T] in the padded stream (doc_start: of the first token of the document);
                                    position < doc_start: padding, which chooses none
    returns     block_indices int32 [T, Hkv, n], global block ids
    raises      ValueError on shapes and block lengths that do not fit together
    """
    if k_cmp.shape[1] == 0 or q.shape[1] % k_cmp.shape[1] or q.shape[2] != k_cmp.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k_cmp {tuple(k_cmp.shape)} do not fit: the key-value heads must divide the query "
            f"heads, and both need one head dim"
        )
    _check_bounds(q, cmp_begin, cmp_end)
    if lse_cmp.shape != q.shape[:2]:
        raise ValueError(
            f"lse_cmp {lse_cmp.dtype} {tuple(lse_cmp.shape)} must be the [T, Hq] = {list(q.shape[:2])} that "
            f"compressed_attention returned for the same q, or probabilities do not add up to one; pass that one"
        )
    if position.shape != q.shape[:1] or doc_start.shape != q.shape[:1]:
        raise ValueError(
            f"position {tuple(position.shape)} and doc_start {tuple(doc_start.shape)} must be [T] = [{q.shape[0]}], "
            f"one place in the padded stream per query; expand doc_start to one entry per token"
        )
    _check_block_lengths(cmp_block_len, cmp_stride, slc_block_len)
    tensors = (q, k_cmp, lse_cmp, cmp_begin, cmp_end, position, doc_start)
    sizes = (cmp_block_len, cmp_stride, slc_block_len, num_slc_blocks, num_init_blocks, num_local_blocks)
    return (SelectionCall(*tensors, softmax_scale, *sizes),)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: the key-value heads must divide "
            f"the query heads, k and v must have the same rows and heads, q and k the same head dim"
        )


def _check_bounds(q: Tensor, begin: Tensor, end: Tensor) -> None:
    if begin.shape != q.shape[:1] or end.shape != q.shape[:1]:
        raise ValueError(
            f"begin {tuple(begin.shape)} and end {tuple(end.shape)} must be [T] = [{q.shape[0]}], one interval of key "
            f"rows per query; pass those of these queries"
        )


def _upstream(
    grad_out: Tensor, gate: Tensor | None, delta: Tensor, softmax_lse: Tensor, q: Tensor, v: Tensor
) -> Upstream:
    if grad_out.shape != (*q.shape[:2], v.shape[2]):
        raise ValueError(
            f"grad_out {grad_out.dtype} {tuple(grad_out.shape)} must be {q.dtype} [T, Hq, Dv] = "
            f"{[*q.shape[:2], v.shape[2]]}, the gradient of the output; reshape or cast it"
        )
    for name, statistic in (("delta", delta), ("softmax_lse", softmax_lse)):
        if statistic.shape != q.shape[:2]:
            raise ValueError(
                f"{name} {tuple(statistic.shape)} must be [T, Hq] = {list(q.shape[:2])}, one number per row; take "
                f"softmax_lse from the forward, and delta as a column of gate_deltas"
            )
    if gate is not None and gate.shape != q.shape[:2]:
        raise ValueError(
            f"gate {tuple(gate.shape)} must be [T, Hq] = {list(q.shape[:2])}, one number per row; pass one branch's "
            f"column, gates[..., b], or None for 1"
        )
    return Upstream(grad_out, gate, delta, softmax_lse)


def _check_chosen(q: Tensor, k: Tensor, block_indices: Tensor, block_table: Tensor, position: Tensor) -> None:
    expected = (q.shape[0], k.shape[1])
    if block_indices.shape[:2] != expected or position.shape != expected[:1] or block_table.shape[0] != expected[1]:
        raise ValueError(
            f"block_indices {tuple(block_indices.shape)}, block_table {tuple(block_table.shape)} and position "
            f"{tuple(position.shape)} must be [T, Hkv, n], [Hkv, num_blocks] and [T] with T={q.shape[0]} and "
            f"Hkv={k.shape[1]}, one row for each query and key-value head; pass them for this rank's tokens"
        )


def _check_remote(q: Tensor, v: Tensor, block_len: int, k_remote: Tensor | None, v_remote: Tensor | None) -> None:
    if k_remote is None and v_remote is None:
        return
    if k_remote is None or v_remote is None:
        raise ValueError(
            f"{'k_remote' if k_remote is None else 'v_remote'} is missing: a page has keys and values, and both are "
            f"read; pass both or neither"
        )
    if k_remote.shape[1:] != (block_len, q.shape[2]) or v_remote.shape != (*k_remote.shape[:2], v.shape[2]):
        raise ValueError(
            f"k_remote {tuple(k_remote.shape)} and v_remote {tuple(v_remote.shape)} must be [pages, {block_len}, D], "
            f"D={q.shape[2]} and {v.shape[2]}, because pages are read like k and v; split the fetched buffer so"
        )


def _check_block_lengths(cmp_block_len: int, cmp_stride: int, slc_block_len: int) -> None:
    for name, length in (("cmp_block_len", cmp_block_len), ("slc_block_len", slc_block_len)):
        if length % cmp_stride:
            needed = -(-length // cmp_stride) * cmp_stride
            raise ValueError(
                f"{name}={length} must be a multiple of cmp_stride={cmp_stride}, so that importance is counted in "
                f"whole strides; take {name}={needed}"
            )
