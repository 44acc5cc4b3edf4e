"""One K/V pair for all branches, gathered one kv head at a time: how a layer with shared keys and values would do it.

    forward     for each kv head: all-gather its K and V into one buffer, the same for every head; compress all of it
                on every rank; attend with the own queries of that head, in all three branches
    backward    the same again; fp32 dK and dV of the three branches are added up and reduce-scattered

A third of the bytes of `gathered`, whose branches have a pair each. The whole sequence of one head is held: its
buffer and the fp32 sums of its gradients, beside them for a while the gradients of one branch. Our kernels here, too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.bench.gathered import GatheredCall, accumulated
from nsa_dist.bench.shard import Shard
from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.plan import ShardPlan

_SAVED_OF_HEAD = 7  # block_indices, three softmax_lse, three outputs


def shared_attention(
    shard: Shard, cfg: NSAConfig, plan: ShardPlan, comm: Comm, ops: Any, softmax_scale: float
) -> Tensor:
    """out [T, Hq, Dv] of this rank's queries, as `nsa_attention` computes it from one pair. The plan pads nothing."""
    call = _Call(cfg, plan, comm, ops, softmax_scale, shard)
    parameters = [p for phi in shard.phi for p in phi.parameters()]
    return _SharedAttention.apply(call, shard.q, shard.gates, shard.kv.k_cmp, shard.kv.v_cmp, *parameters)


class _Call(GatheredCall):
    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, slice, tuple[Tensor, Tensor]]]:
        """(kv head, its query heads, K and V of it: [N, 1, Dk and Dv] of the whole sequence, in the same buffer)."""
        group = q.shape[1] // k.shape[1]
        rows = tuple(x.new_empty(len(self.to_stream), 1, x.shape[2]) for x in (k, v))
        for head in range(k.shape[1]):
            for x, buffer in zip((k, v), rows, strict=True):
                self.gather(x[:, head : head + 1], out=buffer)
            yield head, slice(head * group, (head + 1) * group), (rows[0], rows[1])

    def compress_head(self, rows: Tensor, weights: list[Tensor]) -> Tensor:
        return self.ops.compress_mlp(rows, self.layout.cmp_rows, *weights)

    def weights(self, which: int, head: int) -> list[Tensor]:
        """Of phi of the keys (0) or of the values (1), for one head."""
        return [p.detach()[head : head + 1] for p in self.phi[which].parameters()]


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, q, gates, k, v, *parameters):
        saved, slices = [], []
        for head, of_head, rows in call.heads(q, k, v):
            saved.extend(_attend(call, q[:, of_head], rows, head))
            slices.append(of_head)
        ctx.call, ctx.slices = call, slices
        ctx.save_for_backward(q, gates, k, v, *saved)
        outs = [saved[i + 4 : i + _SAVED_OF_HEAD] for i in range(0, len(saved), _SAVED_OF_HEAD)]
        out = q.new_empty(len(q), q.shape[1], v.shape[2])
        with call.comm.computing("combine", "combine"):
            for of_head, parts in zip(slices, outs, strict=True):
                call.ops.combine(gates[:, of_head], *parts, out=out[:, of_head])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        call: _Call = ctx.call
        q, gates, k, v, *rest = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        deltas, saved = [], []
        for of_head in ctx.slices:  # the branches' results are freed before any gradient is there
            parts = [rest.pop(0) for _ in range(_SAVED_OF_HEAD)]
            with call.comm.computing("delta", "delta"):
                deltas.append(call.ops.gate_deltas(grad_out[:, of_head], *parts[4:]))
            saved.append(parts[:4])
            del parts
        grad_q, own, of_phi = torch.empty_like(q), [], []
        for head, of_head, rows in call.heads(q, k, v):
            upstream = grad_out[:, of_head], gates[:, of_head], deltas[head]
            grads, found = _backward_of_head(call, q[:, of_head], rows, head, upstream, saved[head], grad_q[:, of_head])
            own.append([call.scatter(grads.pop(0)) for _ in range(2)])
            of_phi.append(found)
        dk, dv = (torch.cat(x, 1).to(k.dtype) for x in zip(*own, strict=True))
        grads_phi = [torch.cat(x) for x in zip(*of_phi, strict=True)]
        return None, grad_q, torch.cat(deltas, 1).to(gates.dtype), dk, dv, *grads_phi


def _attend(call: _Call, q: Tensor, rows: tuple[Tensor, Tensor], head: int) -> list[Tensor]:
    """block_indices, softmax_lse and outputs of the three branches, of the query heads of one kv head."""
    ops, layout, cfg, comm = call.ops, call.layout, call.cfg, call.comm
    with comm.computing("phi", "phi"):
        kc, vc = (call.compress_head(x, call.weights(i, head)) for i, x in enumerate(rows))
    with comm.computing("cmp", "cmp"):
        out_cmp, lse_cmp = ops.compressed_attention(q, kc, vc, layout.cmp_begin, layout.cmp_end, **call.interval)
    with comm.computing("select", "select"):
        ids = call.select(q, kc, lse_cmp)
    del kc, vc
    with comm.computing("slc", "slc"):
        out_slc, lse_slc = ops.selected_attention(
            q, *rows, ids, call.table[:1], layout.position, slc_block_len=cfg.slc_block_len, softmax_scale=call.scale
        )
    with comm.computing("win", "win"):
        out_win, lse_win = ops.window_attention(q, *rows, layout.win_begin, layout.win_end, **call.interval)
    return [ids, lse_cmp, lse_slc, lse_win, out_cmp, out_slc, out_win]


def _backward_of_head(
    call: _Call, q: Tensor, rows: tuple[Tensor, Tensor], head: int, upstream, saved: list[Tensor], grad_q: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(dK and dV of the whole sequence, the three branches' added up; gradients of phi's weights); dq into `grad_q`."""
    ops, layout, comm = call.ops, call.layout, call.comm
    (grad_out, gates, deltas), (ids, lse_cmp, lse_slc, lse_win) = upstream, saved
    gate, delta, wide = gates.unbind(-1), deltas.unbind(-1), accumulated(q)
    with comm.computing("slc", "slc"):
        dq_slc, dk, dv, *_ = ops.selected_attention_backward(
            grad_out, gate[1], delta[1], lse_slc, q, *rows, ids, call.table[:1], layout.position,
            slc_block_len=call.cfg.slc_block_len, softmax_scale=call.scale, dtype=wide,
        )  # fmt: skip
        dq_slc = dq_slc.to(q.dtype)
    with comm.computing("win", "win"):
        dq_win, *more = ops.window_attention_backward(
            grad_out, gate[2], delta[2], lse_win, q, *rows, layout.win_begin, layout.win_end,
            kv_dtype=wide, **call.interval,
        )  # fmt: skip
        for total, x in zip((dk, dv), more, strict=True):
            total += x
    del more
    leaves = [[x.detach().requires_grad_() for x in (x, *call.weights(i, head))] for i, x in enumerate(rows)]
    with torch.enable_grad(), comm.computing("phi", "phi"):
        compressed = [call.compress_head(x, weights) for x, *weights in leaves]
    with comm.computing("cmp", "cmp"):
        dq_cmp, *grads = ops.compressed_attention_backward(
            grad_out, gate[0], delta[0], lse_cmp, q, *(c.detach() for c in compressed),
            layout.cmp_begin, layout.cmp_end, **call.interval,
        )  # fmt: skip
    found_phi: list[Tensor] = []
    for total, y, inputs, grad in zip((dk, dv), compressed, leaves, grads, strict=True):
        with comm.computing("phi", "phi"):
            found = torch.autograd.grad(y, inputs, grad.to(y.dtype))
        total += found[0]
        found_phi.extend(found[1:])
    ops.sum_branches(dq_cmp, dq_slc, dq_win, out=grad_q)
    return [dk, dv], found_phi
