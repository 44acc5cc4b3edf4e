"""START HERE: Native Sparse Attention over one device or over a context-parallel group, as one differentiable function.

    k_cmp, v_cmp --halo--> phi --all_gather--> compressed attention --softmax_lse--> selection --+
    k_slc, v_slc ------------------------------------ fetch of the selected remote blocks <------+--> selected attention
    k_win, v_win --halo--> window attention

and the three outputs are summed under their gates. With one rank nothing is sent; the path is the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import nsa_dist.saved  # noqa: F401
from nsa_dist.branches import BranchKV, attend
from nsa_dist.compiled import attention as compiled_attention
from nsa_dist.compiled import takes as compiled_takes
from nsa_dist.compress import Compress
from nsa_dist.config import NSAConfig
from nsa_dist.cp.call import Call
from nsa_dist.cp.comm import Comm, Traffic, fingerprint
from nsa_dist.cp.layout import RankLayout, rank_layout
from nsa_dist.cp.one_sided.choice import with_transport
from nsa_dist.cp.options import MOST_IN_LINE, FetchOptions
from nsa_dist.cp.plan import ShardPlan, as_bounds
from nsa_dist.cp.trace import Trace
from nsa_dist.operators import Tiles, default_ops


class Heads(NamedTuple):
    """What ranks must agree about the heads of one call."""

    num_q_heads: int
    num_kv_heads: int
    dim_k: int
    dim_v: int
    dtype: torch.dtype


def nsa_attention(
    q: Tensor,
    kv: BranchKV,
    gates: Tensor,
    cfg: NSAConfig,
    *,
    compress_k: Compress | None = None,
    compress_v: Compress | None = None,
    cu_seqlens: Tensor | None = None,
    plan: ShardPlan | None = None,
    cp_group: dist.ProcessGroup | Comm | None = None,
    ops: ModuleType | None = None,
    softmax_scale: float | None = None,
    fetch: FetchOptions | None = None,
    traffic: Traffic | None = None,
    trace: Trace | None = None,
    return_block_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention (arXiv 2502.11089, eq. 5 to 12), causal, over a pack of documents.

    q           [T, Hq, Dk]         query heads h*G .. h*G+G-1 share kv head h; RoPE already applied
    kv          six of [T, Hkv, Dk or Dv]; RoPE already applied to k_slc and k_win
    gates       [T, Hq, 3]          weights of the branches cmp, slc, win, after their sigmoid
    compress_k, compress_v          phi: ([M, l, Hkv, D], block_start [M]) -> [M, Hkv, D]; None: the mean. To rotate
                                    compressed keys, do it in compress_k at block_start (position in the document)
    cu_seqlens  int32 [num_docs+1]  of the whole packed sequence; None: one document, or the plan's
    plan, cp_group                  both given: q, kv and gates are `plan.shard(..., rank)` of this rank, whose padding
                                    rows may hold anything; a `Comm` in place of the group stands for it: a measurement
                                    of one rank, a test
    ops         a module with the functions of `nsa_kernels.reference`; None: the Triton kernels on a GPU,
                `nsa_kernels.cpu` on a CPU, the reference for fp64
    softmax_scale                   default Dk ** -0.5
    fetch                           budget, rounds and modes of the remote blocks; None: one round, fetch again in
                                    backward
    traffic     counts the bytes sent, by kind
    trace       records what is sent, computed and waited for, here and in backward
    returns     out [T, Hq, Dv] in the dtype of q; with return_block_indices also int32 [T, Hkv, n], global ids of
                the selected blocks (documents padded to whole blocks), ascending, -1 for none

    Output and gradients do not depend on the group's size, the plan, or an autocast around the call: it is off in here,
    for phi too. What a document holds, NaN and infinity included, reaches no other. Gradients of phi's parameters are
    this rank's part: sum them over the group, as data parallelism over the context-parallel ranks does.

    `torch.compile` takes a call of one rank into its graph as one operator: `nsa_dist.compiled` says which.

    One rank can be captured in a CUDA graph after a call that is not. Give `plan` then, and keep it as long as the
    graph, which reads index tensors that live with it; cu_seqlens on a GPU would make the host wait for them.

    Raises ValueError if shapes, plan, cu_seqlens and group disagree; also if ranks' plans, configs or options differ.
    """
    check_inputs(q, kv, gates, softmax_scale)
    phis = compress_k, compress_v
    if torch.compiler.is_compiling() and compiled_takes(phis, cu_seqlens, plan, cp_group, ops, fetch, traffic, trace):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, ids = compiled_attention(q, kv, gates, cfg, phis, plan, ops, scale)
        return (out, ids) if return_block_indices else out
    comm = cp_group if isinstance(cp_group, Comm) else Comm(cp_group)
    comm = replace(comm, traffic=traffic or comm.traffic, trace=trace or comm.trace)
    if plan is None:
        if comm.size > 1:
            raise ValueError(
                "cp_group was given without a plan: which tokens this rank holds is unknown; pass the ShardPlan with "
                "which q, kv and gates were sharded"
            )
        bounds = [0, q.shape[0]] if cu_seqlens is None else cu_seqlens
        local_plan = ShardPlan.contiguous(bounds, 1, cfg.slc_block_len)
        _check_tokens(q, local_plan.num_tokens, "cu_seqlens[-1]")
    else:
        local_plan = plan
        check_plan(q, plan, cu_seqlens, comm)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    fetch, ops = fetch or FetchOptions(), ops or default_ops(q)
    comm = with_transport(comm, fetch, q)
    tiles = Tiles.of(ops, q.shape[1] // kv.k_cmp.shape[1], cfg, local_plan.num_documents)
    layout = _agreed_layout(local_plan, cfg, q, kv, comm, fetch, tiles.key_alignment)
    tapes, sent = _tapes(local_plan, q, ops, comm, (cfg, softmax_scale, fetch, *tiles.options.items()))
    call = Call(cfg, layout, comm, ops, fetch, softmax_scale, tiles.options, tapes, sent)
    prepare = local_plan.shard if plan is None else local_plan.blank_padding
    with torch.autocast(q.device.type, enabled=False):
        inputs = [prepare(x, comm.rank) for x in (q, *kv, gates)]
        out, block_indices = attend(inputs[0], BranchKV(*inputs[1:7]), inputs[7], phis, call)
        if plan is None:
            out, block_indices = local_plan.unshard([out]), local_plan.unshard([block_indices])
        else:
            out = plan.blank_padding(out, comm.rank)
    if not return_block_indices:
        return out
    if local_plan.block_ids is not None:
        names = local_plan.memo(("block_ids", q.device), lambda: local_plan.block_ids.to(q.device))
        ids = names[block_indices.clamp(min=0).long()]
        block_indices = torch.where(block_indices >= 0, ids, -1).to(torch.int32)
    return out, block_indices.clone()  # they may be the plan's, where all blocks are chosen


def post_agreement(plan: ShardPlan, cfg: NSAConfig, heads: Heads, fetch: FetchOptions, comm: Comm) -> None:
    """Ask whether every rank of the group means the same layout, before `nsa_attention` would, which then only looks.

    At the same place among the group's collectives on every rank. `heads` are those of the attention's tensors, or it
    asks again.
    """
    plan.memo(("asked", cfg, heads, fetch, comm.group), lambda: comm.post_agree(_fingerprint(plan, cfg, heads, fetch)))


def _fingerprint(plan: ShardPlan, cfg: NSAConfig, heads: Heads, fetch: FetchOptions) -> int:
    text = repr((plan.cu_seqlens, plan.cp_size, plan.block_len, plan.layout, cfg, heads, fetch))
    return fingerprint(text)


def _agreed_layout(
    plan: ShardPlan, cfg: NSAConfig, q: Tensor, kv: BranchKV, comm: Comm, fetch: FetchOptions, key_alignment: int
) -> RankLayout:
    """This rank's layout, which every rank of the group means."""
    heads = Heads(q.shape[1], kv.k_slc.shape[1], q.shape[2], kv.v_slc.shape[2], q.dtype)
    check_agreement(plan, cfg, heads, fetch, comm)
    return rank_layout(plan, cfg, comm.rank, q.device, key_alignment)


def check_agreement(plan: ShardPlan, cfg: NSAConfig, heads: Heads, fetch: FetchOptions, comm: Comm) -> None:
    """The first time, make sure that every rank of the group means the same layout. ValueError on all if not."""
    key = (cfg, heads, fetch, comm.group)

    def compare() -> bool:
        asked = plan.memo(("asked", *key), lambda: None)
        return comm.agree(_fingerprint(plan, cfg, heads, fetch)) if asked is None else asked.wait()

    if not plan.memo(("agreed", *key), compare):
        raise ValueError(
            f"the ranks of the context-parallel group disagree about the layout: rank {comm.rank} has {plan.layout} "
            f"over cp_size={plan.cp_size} with {plan.num_documents} documents of {plan.num_tokens} tokens, {cfg} and "
            f"{fetch}; every rank needs the same plan, configs and head sizes, or tokens would be silently scrambled; "
            f"build the plan from the same cu_seqlens on every rank, and pass the same options"
        )


def _tapes(
    plan: ShardPlan, q: Tensor, ops: ModuleType, comm: Comm, key: tuple
) -> tuple[Mapping[str, Any], dict[tuple, dict[str, int]]]:
    """Where kernels keep tapes, those of a call that is short enough to wait for its host; and what its parts send.

    They live and die with the plan, as the index tensors do whose addresses are in them; `key` is what else they hold.
    """
    alone = comm.size == 1 and q.numel() <= MOST_IN_LINE
    if not (alone or comm.in_line) or comm.trace is not None or not q.is_cuda or not hasattr(ops, "Tapes"):
        return {}, {}
    parts = "halo", "window", "phi", "forward", "backward", "phi backward", "halo backward"
    key = ("tapes", ops, q.device, comm.group, comm.generation, *key)
    return plan.memo(key, lambda: ({part: ops.Tapes() for part in parts}, {}))


def check_inputs(q: Tensor, kv: BranchKV, gates: Tensor, softmax_scale: float | None) -> None:
    """ValueError unless shapes, dtypes and devices of packed tokens fit together."""
    if q.dim() != 3 or kv.k_cmp.dim() != 3 or kv.v_cmp.dim() != 3:
        raise ValueError(
            f"q {tuple(q.shape)}, kv.k_cmp {tuple(kv.k_cmp.shape)} and kv.v_cmp {tuple(kv.v_cmp.shape)} must each be "
            f"[tokens, heads, head dim], because documents are packed one behind the other, without a batch dim; "
            f"flatten batch and sequence, and say with cu_seqlens where documents end"
        )
    tokens, num_q_heads, dim_k = q.shape
    num_kv_heads = kv.k_cmp.shape[1]
    for name, x in zip(kv._fields, kv, strict=True):
        dim = dim_k if name.startswith("k") else kv.v_cmp.shape[2]
        if tuple(x.shape) != (tokens, num_kv_heads, dim):
            raise ValueError(
                f"kv.{name} has shape {tuple(x.shape)}, but with q {tuple(q.shape)} it must be "
                f"({tokens}, {num_kv_heads}, {dim}): every branch has a key and a value for every token and kv head"
            )
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"{num_q_heads} query heads cannot share {num_kv_heads} kv heads evenly; the kv heads must divide them"
        )
    if tuple(gates.shape) != (tokens, num_q_heads, 3):
        raise ValueError(
            f"gates has shape {tuple(gates.shape)}, but must be ({tokens}, {num_q_heads}, 3): one weight for each "
            f"token, query head and branch (cmp, slc, win)"
        )
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(
            f"softmax_scale={softmax_scale} must be positive and finite, because kernels look for the largest score "
            f"before they scale it; negate q instead, or leave it out for Dk ** -0.5"
        )
    _check_dtypes(q, kv, gates)


def _check_dtypes(q: Tensor, kv: BranchKV, gates: Tensor) -> None:
    named = {"q": q, **{f"kv.{name}": x for name, x in zip(kv._fields, kv, strict=True)}, "gates": gates}
    for name, x in named.items():
        same = x.dtype == q.dtype or name == "gates"
        if not x.is_floating_point() or x.device != q.device or not same:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and q {q.dtype} on {q.device}: all must be floating-point and on "
                f"one device, q and kv of one dtype, because they are multiplied as they are, under autocast too; "
                f"pass {name}.to(q)"
            )


def _check_tokens(q: Tensor, expected: int, source: str) -> None:
    if q.shape[0] != expected:
        raise ValueError(
            f"q has {q.shape[0]} tokens, but {source} says {expected}; pass q, kv and gates of that many tokens"
        )


def check_plan(q: Tensor, plan: ShardPlan, cu_seqlens: Tensor | Sequence[int] | None, comm: Comm) -> None:
    """ValueError unless q is a shard of the plan, which is one of the group and of these documents."""
    if comm.size != plan.cp_size:
        raise ValueError(
            f"the plan is for cp_size={plan.cp_size}, but cp_group has {comm.size} ranks; build the plan with "
            f"cp_size={comm.size} or pass the group of {plan.cp_size}"
        )
    _check_tokens(q, plan.tokens_per_rank, "plan.tokens_per_rank (padding counted: shard with plan.shard)")
    if cu_seqlens is not None and as_bounds(cu_seqlens) != plan.cu_seqlens:
        raise ValueError(
            "cu_seqlens and plan.cu_seqlens differ: the documents the plan was built for are not these; build the "
            "plan from this cu_seqlens, or pass cu_seqlens=None to take the plan's"
        )
