"""Attention of every query to one interval of key rows: the compressed branch (section 3.3.1) and the window (3.3.3).

    s[t, h, i] = softmax_scale * q[t, h] . k[i, h // G]          for begin[t] <= i < end[t]
    out[t, h]  = sum_i softmax(s[t, h])[i] * v[i, h // G]        softmax_lse[t, h] = log sum_i exp(s[t, h, i])

and its gradients under a gate, one kernel that owns queries (dQ) and one that owns keys (dK, dV), without atomics:

    P = exp(S - lse)     dP = dO V^T     delta = rowsum(dO * O) - dlse     dS = gate * P * (dP - delta)
    dQ = scale * dS K    dK = scale * dS^T Q    dV = (gate * P)^T dO

`gate` is there because the layer's output is sum_b gate_b * out_b: every branch takes the layer's dO and the rows' own
gate, so that no gate_b * dO is ever written. It may be negative, or None for 1.

| | plain Triton | Hopper GPUs, where `common.hopper` takes it |
|---|---|---|
| forward of cmp, of win | `cmp_forward`, `win_forward` | `hopper_forward` |
| dQ of cmp, of win | `cmp_grad_q`, `win_grad_q` | `hopper_grad_q` |
| dK, dV of both | `grad_kv` | `hopper_grad_kv` |

Shapes      `contracts.interval_attention`; bf16, fp16 or fp32, Dv a power of two of at least 16, Dk too or the sum of
            two (192). q, k, v and grad_out are copied where the copy engine cannot read them: last stride 1, others in
            whole 16 bytes; gate, delta and softmax_lse of any strides
Numerics    tensor cores take the input dtype (P and dS too) and add up in fp32; the softmax is fp32; each result is
            rounded once. The bits of a row depend on neither its neighbours nor its place in a tile.
Work        forward 2 * (Dk + Dv), dQ 4 * Dk + 2 * Dv, dK and dV 4 * Dk + 4 * Dv FLOP a visible (query, head, key)
Reference   nsa_kernels.reference
Source      Dao 2023, arXiv:2307.08691, section 3.1; a group's rows in one tile: Ainslie et al. 2023, arXiv:2305.13245
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_kernels import contracts
from nsa_kernels.common.deltas import row_deltas
from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.limits import check_interval, check_upstream
from nsa_kernels.common.tiles import copyable_by_tma
from nsa_kernels.contracts import IntervalCall, Upstream, meets
from nsa_kernels.interval import (
    cmp_forward,
    cmp_grad_q,
    grad_kv,
    hopper_forward,
    hopper_grad_kv,
    hopper_grad_q,
    win_forward,
    win_grad_q,
)
from nsa_kernels.interval.statistics import row_statistics
from nsa_kernels.interval.tiles import KEY_TILE
from nsa_kernels.interval.unseen import unseen_tiles


@meets(contracts.interval_attention)
def compressed_attention(call: IntervalCall, *, aligned: bool | None = None) -> tuple[Tensor, Tensor]:
    """Option of these kernels:

    aligned     whether documents begin where `wild.WHOLE_TILES` says. True: tiles hold one document each, so NaN of one
                reaches no other. False: the plain kernels keep rows apart one by one. None: it is not known; they
                do so, but the kernels for Hopper, which cannot, are used all the same
    """
    check_interval(call)
    return _attend(_CMP, _dense_bounds(call), aligned)


@meets(contracts.interval_attention_backward)
@torch.no_grad()
def compressed_attention_backward(
    upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None, *, aligned: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """aligned     as in `compressed_attention`"""
    check_interval(call)
    check_upstream(upstream, call.q)
    return _gradients(_CMP, upstream, _dense_bounds(call), kv_dtype, aligned)


@meets(contracts.interval_attention)
def window_attention(call: IntervalCall, *, aligned: bool | None = None) -> tuple[Tensor, Tensor]:
    """aligned     as in `compressed_attention`"""
    check_interval(call)
    return _attend(_WIN, _dense_bounds(call), aligned)


@meets(contracts.interval_attention_backward)
@torch.no_grad()
def window_attention_backward(
    upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None, *, aligned: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """aligned     as in `compressed_attention`"""
    check_interval(call)
    check_upstream(upstream, call.q)
    return _gradients(_WIN, upstream, _dense_bounds(call), kv_dtype, aligned)


class _Branch(NamedTuple):
    """The kernels that cmp and win do not share. `apart`: see `wild`."""

    attend: Callable[..., None]  # (call, out, lse, apart)
    attend_on_hopper: Callable[..., None]  # (call, out, lse)
    grad_q: Callable[..., Tensor]  # (call, statistics, grad_out, apart)
    grad_q_on_hopper: Callable[..., Tensor]


def _attend_window_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> None:
    unseen = unseen_tiles(begin, end, k.shape[0], KEY_TILE)
    hopper_forward.attend(q, k, v, begin, end, out, lse, softmax_scale, key_tile=KEY_TILE, unseen=unseen)


def _grad_q_on_hopper(*arguments, apart: bool) -> Tensor:
    return hopper_grad_q.grad_q(*arguments)


def _window_grad_q_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, statistics: Tensor, grad_out: Tensor, softmax_scale,
    *, apart: bool,
) -> Tensor:  # fmt: skip
    arguments = (q, k, v, begin, end, statistics, grad_out, softmax_scale)
    if q.shape[1] == k.shape[1] and q.shape[2] <= 128:  # 128 rows are as many queries, whose windows span 11 key tiles
        return win_grad_q.grad_q(*arguments, apart=apart)
    return hopper_grad_q.grad_q(*arguments, unseen=unseen_tiles(begin, end, k.shape[0], KEY_TILE))


_CMP = _Branch(cmp_forward.attend, hopper_forward.attend, cmp_grad_q.grad_q, _grad_q_on_hopper)
_WIN = _Branch(win_forward.attend, _attend_window_on_hopper, win_grad_q.grad_q, _window_grad_q_on_hopper)


def _attend(branch: _Branch, call: IntervalCall, aligned: bool | None) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        return _IntervalAttention.apply(branch, aligned, *call)
    return _forward(branch, _copyable(call), aligned)


def _copyable(call: IntervalCall) -> IntervalCall:
    return call._replace(q=copyable_by_tma(call.q), k=copyable_by_tma(call.k), v=copyable_by_tma(call.v))


def _forward(branch: _Branch, call: IntervalCall, aligned: bool | None) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if k.shape[0] == 0 or q.shape[0] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if _on_hopper(q, k, v, aligned):
        branch.attend_on_hopper(q, k, v, call.begin, call.end, out, lse, call.softmax_scale)
    else:
        branch.attend(q, k, v, call.begin, call.end, out, lse, call.softmax_scale, apart=aligned is not True)
    return out, lse


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch, aligned, *call):
        copied = _copyable(IntervalCall(*call))
        out, lse = _forward(branch, copied, aligned)
        ctx.branch, ctx.aligned, ctx.softmax_scale = branch, aligned, copied.softmax_scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*copied[:5], out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, begin, end, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else copyable_by_tma(grad_out)
        upstream = Upstream(grad_out, None, row_deltas(out, grad_out, grad_lse), lse)
        call = IntervalCall(q, k, v, begin, end, ctx.softmax_scale)
        return None, None, *_gradients(ctx.branch, upstream, call, None, ctx.aligned), None, None, None


def _gradients(
    branch: _Branch, upstream: Upstream, call: IntervalCall, kv_dtype: torch.dtype | None, aligned: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v; dk and dv in `kv_dtype` if it is given."""
    q, k, v, begin, end, softmax_scale = call
    if k.shape[0] == 0 or q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k, dtype=kv_dtype), torch.zeros_like(v, dtype=kv_dtype)
    q, k, v, grad_out = (copyable_by_tma(x) for x in (q, k, v, upstream.grad_out))
    _, gate, delta, softmax_lse = upstream
    statistics = row_statistics(softmax_lse, delta, gate, begin, end, k.shape[1])
    arguments = (q, k, v, begin, end, statistics, grad_out, softmax_scale)
    apart = aligned is not True
    if _on_hopper(q, k, v, aligned):
        return branch.grad_q_on_hopper(*arguments, apart=apart), *hopper_grad_kv.grad_kv(*arguments, kv_dtype)
    return branch.grad_q(*arguments, apart=apart), *grad_kv.grad_kv(*arguments, kv_dtype, apart=apart)


def _on_hopper(q: Tensor, k: Tensor, v: Tensor, aligned: bool | None) -> bool:
    return hopper_takes(q, k, aligned) and v.shape[2] in (64, 128)


def _dense_bounds(call: IntervalCall) -> IntervalCall:
    return call._replace(begin=call.begin.contiguous(), end=call.end.contiguous())
