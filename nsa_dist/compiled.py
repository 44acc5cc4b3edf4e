"""`nsa_attention` of one rank as one operator of torch's, `nsa_dist::attention`, which `torch.compile` takes as it is.

A traced graph cannot hold what the layer does on the host: plans, tables, recordings of launches. So it holds the
layer, forward and backward, as two operators that do all of it when they run. Other calls never come here.

    attention            out, block_indices, and what backward needs: compressed keys and values, the branches' results
    attention_backward   gradients of q, the six of keys and values, the gates and phi's weights; phi is computed again

What they take: one rank; documents by a plan (`cu_seqlens` would have to be read by the host); phi a plain
`CompressMLP` or None; `ops` a module. All else is traced as it stands, and breaks the graph.
"""

import importlib
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_dist.branches import BranchKV, _backward, _Branches
from nsa_dist.compress import BlockPlaces, Compress, compress_both
from nsa_dist.config import NSAConfig
from nsa_dist.cp.call import Call, head_groups
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.gather import CompressedGather
from nsa_dist.cp.layout import rank_layout
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.cp.window import WindowForward
from nsa_dist.operators import Tiles, default_ops

Phis = tuple[Compress | None, Compress | None]


class _Phi:
    """An MLP of weights that are no module's."""

    takes_rows = True

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = tuple(weights)

    def mlp_weights(self) -> tuple[Tensor, ...]:
        return self._weights

    def __call__(self, rows: Tensor, start: Tensor, block_rows: Tensor, ops: ModuleType) -> Tensor:
        return ops.compress_mlp(rows, block_rows, *self._weights)


def takes(phis: Phis, cu_seqlens: Any, plan: ShardPlan | None, cp_group: Any, ops: Any, *others: Any) -> bool:
    """Whether a call with these arguments of `nsa_attention` is one operator of a compiled graph."""
    plain = [phi is None or _weights(phi) is not None for phi in phis]
    alone = cp_group is None and (plan is None or plan.cp_size == 1)
    named = ops is None or isinstance(ops, ModuleType)
    return all(plain) and alone and named and cu_seqlens is None and all(x is None for x in others)


def attention(
    q: Tensor, kv: BranchKV, gates: Tensor, cfg: NSAConfig, phis: Phis, plan: ShardPlan | None, ops: ModuleType | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and block_indices of what it `takes`."""
    weights = [_weights(phi) if phi is not None else () for phi in phis]
    bounds = [0, q.shape[0]] if plan is None else list(plan.cu_seqlens)
    sizes = [
        cfg.cmp_block_len, cfg.cmp_stride, cfg.slc_block_len, cfg.num_slc_blocks, cfg.num_init_blocks,
        cfg.num_local_blocks, cfg.window_len,
    ]  # fmt: skip
    name = "" if ops is None else ops.__name__
    results = torch.ops.nsa_dist.attention(
        q, list(kv), gates, list(weights[0] or ()), list(weights[1] or ()), bounds, plan is not None, sizes,
        softmax_scale, name,
    )  # fmt: skip
    return results[0], results[1]


def _weights(phi: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    return phi.mlp_weights() if hasattr(phi, "mlp_weights") else None


@torch.library.custom_op("nsa_dist::attention", mutates_args=())
def _attention(
    q: Tensor, kv: Sequence[Tensor], gates: Tensor, phi_k: Sequence[Tensor], phi_v: Sequence[Tensor],
    bounds: Sequence[int], is_sharded: bool, sizes: Sequence[int], softmax_scale: float, ops: str,
) -> list[Tensor]:  # fmt: skip
    """is_sharded   q, kv and gates are rows of the plan, padding included; else the documents' tokens"""
    run = _Run.of(q, q.shape[1] // kv[0].shape[1], bounds, is_sharded, sizes, softmax_scale, ops)
    call = run.call
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q, k_rows, v_rows, k_slc, v_slc, k_win, v_win, gates = (run.prepared(x) for x in (q, *kv, gates))
        window = WindowForward(q, k_win, v_win, call)
        window.attend_interior()
        k_cmp, v_cmp = run.compressed((k_rows, v_rows), (phi_k, phi_v))
        out, ids = _Branches.forward(run.ctx, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, window, call)
        saved = list(run.ctx.saved_tensors[-7:])  # lse_win, out_win, out_cmp, lse_cmp, ids, out_slc, lse_slc
        saved[4] = ids.clone()  # results of an operator share no memory, and these may be the plan's
        results = [run.plan.blank_padding(out, 0), ids] if is_sharded else [run.plan.unshard([x]) for x in (out, ids)]
        results[1] = results[1].clone()
    return [x.contiguous() for x in (*results, k_cmp, v_cmp, *saved)]


@_attention.register_fake
def _(q, kv, gates, phi_k, phi_v, bounds, is_sharded, sizes, softmax_scale, ops):
    cfg, (num_q_heads, num_kv_heads, dim_v) = NSAConfig(*sizes), (q.shape[1], kv[0].shape[1], kv[1].shape[2])
    num_rows, num_blocks = q.shape[0], 0
    if not is_sharded:
        num_rows = sum((b - a + cfg.slc_block_len - 1) // cfg.slc_block_len for a, b in pairwise(bounds))
        num_rows = num_rows * cfg.slc_block_len
    for a, b in pairwise(bounds):
        num_blocks += torch.sym_max(0, (b - a - cfg.cmp_block_len) // cfg.cmp_stride + 1)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    def rows(count, *shape, dtype=q.dtype):
        return q.new_empty(count, *shape, dtype=dtype)

    def outs():
        return rows(num_rows, num_q_heads, dim_v)

    def lses():
        return rows(num_rows, num_q_heads, dtype=lse_dtype)

    def ids(count):
        return rows(count, num_kv_heads, cfg.num_slc_blocks, dtype=torch.int32)

    compressed = [rows(num_blocks, num_kv_heads, x.shape[2]) for x in kv[:2]]
    out = rows(q.shape[0], num_q_heads, dim_v)
    return [out, ids(q.shape[0]), *compressed, lses(), outs(), outs(), lses(), ids(num_rows), outs(), lses()]


@torch.library.custom_op("nsa_dist::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, q: Tensor, kv: Sequence[Tensor], gates: Tensor, phi_k: Sequence[Tensor], phi_v: Sequence[Tensor],
    saved: Sequence[Tensor],
    bounds: Sequence[int], is_sharded: bool, sizes: Sequence[int], softmax_scale: float, ops: str,
) -> list[Tensor]:  # fmt: skip
    run = _Run.of(q, q.shape[1] // kv[0].shape[1], bounds, is_sharded, sizes, softmax_scale, ops)
    call, given = run.call, [q, *kv, gates]
    with torch.autocast(q.device.type, enabled=False), _autograd_inside():
        with torch.no_grad():
            grad_out, q, *kv, gates = (run.prepared(x) for x in (grad_out, q, *kv, gates))
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (*kv[:2], *phi_k, *phi_v)]
            of_k, of_v = leaves[2 : 2 + len(phi_k)], leaves[2 + len(phi_k) :]
            pair = run.compressed(leaves[:2], (of_k, of_v))
        with torch.no_grad():
            ctx = run.ctx
            heads = HeadSizes(q.shape[1], kv[2].shape[1], kv[2].shape[2], kv[3].shape[2], q.itemsize)
            ctx.call, ctx.groups = call, head_groups(heads, len(q), call)
            ctx.num_own, ctx.routes, ctx.num_kept, ctx.num_marks = len(saved[0]), [[]], 0, 0
            placed = CompressedGather(saved[0], saved[1], call.layout, call.comm).wait()
            grads = list(_backward([grad_out, q, *placed, *kv[2:], gates, *saved[2:]], ctx))
        of_phi = torch.autograd.grad(pair, leaves, grads[1:3])
        found = [grads[0], *of_phi[:2], *grads[3:8]]
    with torch.no_grad():
        found = [run.returned(grad, like) for grad, like in zip(found, given, strict=True)]
    return [*found, *of_phi[2:]]


@_attention_backward.register_fake
def _(grad_out, q, kv, gates, phi_k, phi_v, saved, bounds, is_sharded, sizes, softmax_scale, ops):
    given = (q, *kv, gates, *phi_k, *phi_v)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _setup(ctx, inputs, output) -> None:
    q, kv, gates, phi_k, phi_v, *ctx.others = inputs
    ctx.counts = len(phi_k), len(phi_v)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, *kv, gates, *phi_k, *phi_v, *output[2:])


def _differentiate(ctx, grads):
    tensors, (num_k, num_v) = ctx.saved_tensors, ctx.counts
    inputs, saved = tensors[: 8 + num_k + num_v], tensors[8 + num_k + num_v :]
    if grads[0] is None:
        return (None,) * 10
    q, kv, gates, phi_k, phi_v = _parted(inputs, num_k)
    found = torch.ops.nsa_dist.attention_backward(grads[0], q, kv, gates, phi_k, phi_v, list(saved), *ctx.others)
    return (*_parted(found, num_k), *(None,) * 5)


def _parted(tensors: Sequence[Tensor], num_k: int) -> tuple:
    """q, the six, gates and the weights of both phis, of all in a row."""
    return tensors[0], list(tensors[1:7]), tensors[7], list(tensors[8 : 8 + num_k]), list(tensors[8 + num_k :])


_attention.register_autograd(_differentiate, setup_context=_setup)


def _autograd_inside() -> Any:
    """Autograd at work in an operator, which torch switches off there: phi, and the reference, take gradients by it."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(included, excluded)


class _Ctx(SimpleNamespace):
    """What `_Branches.forward` needs of autograd's, outside of it."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class _Run(NamedTuple):
    """One run of either operator."""

    plan: ShardPlan
    call: Call
    is_sharded: bool
    ctx: _Ctx

    @classmethod
    def of(
        cls, q: Tensor, group: int, bounds: Sequence[int], is_sharded: bool, sizes: Sequence[int],
        softmax_scale: float, ops: str,
    ) -> "_Run":  # fmt: skip
        cfg, comm, options = NSAConfig(*sizes), Comm(None), FetchOptions()
        plan = ShardPlan.contiguous(bounds, 1, cfg.slc_block_len)
        functions = importlib.import_module(ops) if ops else default_ops(q)
        tiles = Tiles.of(functions, group, cfg, plan.num_documents)
        layout = rank_layout(plan, cfg, 0, q.device, tiles.key_alignment)
        call = Call(cfg, layout, comm, functions, options, softmax_scale, tiles.options)
        return cls(plan, call, is_sharded, _Ctx())

    def prepared(self, x: Tensor) -> Tensor:
        """Rows of the plan, its padding zero."""
        return self.plan.blank_padding(x, 0) if self.is_sharded else self.plan.shard(x, 0)

    def returned(self, grad: Tensor, like: Tensor) -> Tensor:
        """The gradient of what was prepared, as of `like`: contiguous, and no other tensor's memory."""
        grad = self.plan.blank_padding(grad, 0) if self.is_sharded else self.plan.unshard([grad])
        return grad.to(like.dtype).contiguous()

    def compressed(self, rows: Sequence[Tensor], phis: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        layout = self.call.layout
        places = BlockPlaces(layout.cmp_rows, layout.cmp_block_start, self.call.cfg.cmp_block_len)
        both = [_Phi(weights) if weights else None for weights in phis]
        return compress_both((both[0], both[1]), (rows[0], rows[1]), places, self.call.ops)
