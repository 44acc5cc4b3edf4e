"""The baseline: three raw K/V pairs, one a branch, gathered naively. All of them go to everybody.

    forward     all-gather K and V of each branch; compress all of them on every rank; attend with the own queries
    backward    the same again, and reduce-scatter of fp32 dK and dV

S bytes forward and 3 S backward, where S is all K and V of the layer, three branches of them; the whole sequence of
one branch is held at once, all its heads. The public layer that we know to gather has one pair for all branches
instead, and takes a head at a time (`gathered_heads`). The kernels are ours, so that what differs is how bytes travel.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.bench.shard import Shard
from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.layout import RankLayout, rank_layout
from nsa_dist.cp.plan import ShardPlan


def gathered_attention(
    shard: Shard, cfg: NSAConfig, plan: ShardPlan, comm: Comm, ops: Any, softmax_scale: float
) -> Tensor:
    """out [T, Hq, Dv] of this rank's queries, as `nsa_attention` computes it. The plan pads nothing."""
    call = GatheredCall(cfg, plan, comm, ops, softmax_scale, shard)
    parameters = [p for phi in shard.phi for p in phi.parameters()]
    return _GatheredAttention.apply(call, shard.q, shard.gates, *shard.kv, *parameters)


class GatheredCall:
    """What forward and backward share: where every token stands, and the branches on whole keys."""

    def __init__(self, cfg, plan, comm, ops, softmax_scale, shard) -> None:
        self.cfg, self.plan, self.comm, self.ops, self.scale, self.phi = cfg, plan, comm, ops, softmax_scale, shard.phi
        # One document: nothing is to be kept apart.
        self.interval = {"softmax_scale": softmax_scale, **({"aligned": True} if hasattr(ops, "WHOLE_TILES") else {})}
        device = shard.q.device
        whole = rank_layout(self._whole_plan(), cfg, 0, device)
        mine = plan.stream_positions(comm.rank).to(device)
        per_query = ("position", "doc_start", "cmp_begin", "cmp_end", "win_begin", "win_end")
        self.layout: RankLayout = replace(whole, **{name: getattr(whole, name)[mine] for name in per_query})
        self.to_ranks = plan.memo(
            ("stream order", device),
            lambda: torch.cat([plan.stream_positions(r) for r in range(plan.cp_size)]).to(device),
        )
        self.to_stream = plan.memo(("rank order", device), lambda: self.to_ranks.argsort())
        pages = torch.arange(plan.num_blocks, dtype=torch.int32, device=device)
        self.table = pages.expand(shard.kv.k_slc.shape[1], -1).contiguous()

    def _whole_plan(self) -> ShardPlan:
        plan = self.plan
        return plan.memo(("whole",), lambda: ShardPlan.contiguous(plan.cu_seqlens, 1, plan.block_len))

    def gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, ...] of every rank -> [N, ...] in the order of the sequence; into `out`, if it is given."""
        gathered = self.comm.all_gather(x.detach(), "raw").flatten(0, 1)
        return torch.index_select(gathered, 0, self.to_stream, out=out)

    def scatter(self, grad: Tensor) -> Tensor:
        """The dual: what every rank found for all tokens -> the sum for the own ones."""
        by_rank = grad.to(accumulated(grad)).index_select(0, self.to_ranks).unflatten(0, (self.comm.size, -1))
        return self.comm.reduce_scatter(by_rank, "raw.grad")

    def compress(self, which: int, rows: Tensor) -> Tensor:
        return self.phi[which](rows, self.layout.cmp_block_start, block_rows=self.layout.cmp_rows, ops=self.ops)

    def select(self, q: Tensor, kc: Tensor, lse_cmp: Tensor) -> Tensor:
        """block_indices of these queries, from the compressed keys of the whole sequence."""
        cfg, layout = self.cfg, self.layout
        return self.ops.select_blocks(
            q, kc, lse_cmp, layout.cmp_begin, layout.cmp_end, layout.position, layout.doc_start,
            softmax_scale=self.scale,
            cmp_block_len=cfg.cmp_block_len,
            cmp_stride=cfg.cmp_stride,
            slc_block_len=cfg.slc_block_len,
            num_slc_blocks=cfg.num_slc_blocks,
            num_init_blocks=cfg.num_init_blocks,
            num_local_blocks=cfg.num_local_blocks,
        )  # fmt: skip


class _GatheredAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: GatheredCall, q, gates, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, *parameters):
        ops, layout, cfg, comm = call.ops, call.layout, call.cfg, call.comm
        begin, end = layout.cmp_begin, layout.cmp_end
        rows = [call.gather(k_cmp), call.gather(v_cmp)]
        with comm.computing("phi", "phi"):
            kc, vc = (call.compress(which, x) for which, x in enumerate(rows))
        del rows
        with comm.computing("cmp", "cmp"):
            out_cmp, lse_cmp = ops.compressed_attention(q, kc, vc, begin, end, **call.interval)
        with comm.computing("select", "select"):
            ids = call.select(q, kc, lse_cmp)
        del kc, vc
        rows = [call.gather(k_slc), call.gather(v_slc)]
        with comm.computing("slc", "slc"):
            out_slc, lse_slc = ops.selected_attention(
                q, *rows, ids, call.table, layout.position, slc_block_len=cfg.slc_block_len, softmax_scale=call.scale
            )
        rows = [call.gather(k_win), call.gather(v_win)]
        with comm.computing("win", "win"):
            out_win, lse_win = ops.window_attention(q, *rows, layout.win_begin, layout.win_end, **call.interval)
        del rows
        ctx.call = call
        outs = (out_cmp, out_slc, out_win)
        ctx.save_for_backward(q, gates, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, ids, lse_cmp, lse_slc, lse_win, *outs)
        with comm.computing("combine", "combine"):
            return ops.combine(gates, *outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        call: GatheredCall = ctx.call
        ops, layout, comm, scale = call.ops, call.layout, call.comm, {"softmax_scale": call.scale}
        q, gates, *kv, ids, lse_cmp, lse_slc, lse_win, out_cmp, out_slc, out_win = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # the branches' results are freed at once, as `nsa_dist.branches` does
        with comm.computing("delta", "delta"):
            deltas = ops.gate_deltas(grad_out, out_cmp, out_slc, out_win)
        del out_cmp, out_slc, out_win
        gate, delta = gates.unbind(-1), deltas.unbind(-1)
        rows = [call.gather(x) for x in kv[4:]]
        with comm.computing("win", "win"):
            dq_win, dk, dv = ops.window_attention_backward(
                grad_out, gate[2], delta[2], lse_win, q, *rows, layout.win_begin, layout.win_end, **call.interval
            )
        del rows
        grads_win = [call.scatter(dk), call.scatter(dv)]
        del dk, dv
        rows = [call.gather(x) for x in kv[2:4]]
        with comm.computing("slc", "slc"):
            dq_slc, dk, dv, *_ = ops.selected_attention_backward(
                grad_out, gate[1], delta[1], lse_slc, q, *rows, ids, call.table, layout.position,
                slc_block_len=call.cfg.slc_block_len, **scale,
            )  # fmt: skip
        del rows
        grads_slc = [call.scatter(dk), call.scatter(dv)]
        del dk, dv
        dq, grads_cmp, grads_phi = _compressed_backward(call, q, kv[:2], grad_out, gate[0], delta[0], lse_cmp)
        dq = ops.sum_branches(dq, dq_slc, dq_win)
        grads = [g.to(x.dtype) for g, x in zip([*grads_cmp, *grads_slc, *grads_win], kv, strict=True)]
        return None, dq, deltas.to(gates.dtype), *grads, *grads_phi


def _compressed_backward(
    call: GatheredCall, q, kv, grad_out, gate, delta, lse
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dq, own dK and dV, gradients of phi's parameters): everything is compressed once more."""
    rows, compressed = [], []
    with torch.enable_grad(), call.comm.computing("phi", "phi"):
        for which, x in enumerate(kv):
            rows.append(call.gather(x).requires_grad_())
            compressed.append(call.compress(which, rows[-1]))
    with call.comm.computing("cmp", "cmp"):
        dq, *grads = call.ops.compressed_attention_backward(
            grad_out, gate, delta, lse, q, *(c.detach() for c in compressed),
            call.layout.cmp_begin, call.layout.cmp_end, **call.interval,
        )  # fmt: skip
    own: list[Tensor] = []
    grads_phi: list[Tensor] = []
    for which, phi in enumerate(call.phi):
        grad = grads[which].to(compressed[which].dtype)
        with call.comm.computing("phi", "phi"):
            found = torch.autograd.grad(compressed[which], [rows[which], *phi.parameters()], grad)
        own.append(call.scatter(found[0]))
        grads_phi.extend(found[1:])
    return dq, own, grads_phi


def accumulated(x: Tensor) -> torch.dtype:
    """The dtype in which gradients are summed."""
    return torch.promote_types(x.dtype, torch.float32)
