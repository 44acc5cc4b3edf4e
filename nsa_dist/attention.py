"""START HERE: Native Sparse Attention over one device or over a context-parallel group, as one differentiable function.

    k_cmp, v_cmp --halo--> phi --all_gather--> compressed attention --softmax_lse--> selection --+
    k_slc, v_slc ------------------------------------ fetch of the selected remote blocks <------+--> selected attention
    k_win, v_win --halo--> window attention

and the three outputs are summed under their gates. With one rank nothing is sent; the path is the same.
"""

import hashlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm, Traffic
from nsa_dist.cp.fetch import FetchOptions
from nsa_dist.cp.gather import gather_compressed
from nsa_dist.cp.halo import exchange_halos
from nsa_dist.cp.layout import RankLayout, rank_layout
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.cp.selected import selected_over_ranks

# phi: ([M, l, Hkv, D], in-document start of each block [M]) -> [M, Hkv, D]
Compress = Callable[..., Tensor]


class BranchKV(NamedTuple):
    """Keys and values of the three branches, each [T, Hkv, Dk or Dv]. To share one pair, pass it three times."""

    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


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
    cp_group: dist.ProcessGroup | None = None,
    ops: ModuleType | None = None,
    softmax_scale: float | None = None,
    fetch: FetchOptions | None = None,
    traffic: Traffic | None = None,
    return_block_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention (arXiv 2502.11089, eq. 5 to 12), causal, over a pack of documents.

    q           [T, Hq, Dk]         query heads h*G .. h*G+G-1 share kv head h; RoPE already applied
    kv          six of [T, Hkv, Dk or Dv]; RoPE already applied to k_slc and k_win
    gates       [T, Hq, 3]          weights of the branches cmp, slc, win, after their sigmoid
    compress_k, compress_v          phi: ([M, l, Hkv, D], block_start [M]) -> [M, Hkv, D]; None: the mean. To rotate
                                    compressed keys, do it in compress_k at block_start (position in the document)
    cu_seqlens  int32 [num_docs+1]  of the whole packed sequence; None: one document, or the plan's
    plan, cp_group                  both given: q, kv and gates are `plan.shard(..., rank)` of this rank
    ops         a module with the functions of `nsa_kernels.reference`; None: the Triton kernels on a GPU,
                `nsa_kernels.cpu` on a CPU, the reference for fp64
    softmax_scale                   default Dk ** -0.5
    fetch                           budget, rounds and modes of the remote blocks; None: one round, fetch again in
                                    backward
    traffic     counts the bytes sent, by kind
    returns     out [T, Hq, Dv] in the dtype of q; with return_block_indices also int32 [T, Hkv, n], global ids of
                the selected blocks (documents padded to whole blocks), ascending, -1 for none

    Output and gradients do not depend on the group's size or the plan. Gradients of phi's parameters are this rank's
    part: sum them over the group, as data parallelism over the context-parallel ranks does.

    Raises ValueError if shapes, plan, cu_seqlens and group disagree; also if the ranks' plans or configs differ.
    """
    _check_shapes(q, kv, gates)
    if plan is None:
        if cp_group is not None and dist.get_world_size(cp_group) > 1:
            raise ValueError(
                "cp_group was given without a plan: which tokens this rank holds is unknown; pass the ShardPlan with "
                "which q, kv and gates were sharded"
            )
        whole = ShardPlan.contiguous([0, q.shape[0]] if cu_seqlens is None else cu_seqlens, 1, cfg.slc_block_len)
        _check_tokens(q, whole.num_tokens, "cu_seqlens[-1]")
        inputs = [whole.shard(x, 0) for x in (q, *kv, gates)]
        local_plan, comm = whole, Comm(None, traffic or Traffic())
    else:
        _check_plan(q, plan, cu_seqlens, cp_group)
        inputs, local_plan, comm = [q, *kv, gates], plan, Comm(cp_group, traffic or Traffic())
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    layout = _agreed_layout(local_plan, cfg, q, kv, comm)
    out, block_indices = _attend(
        inputs[0],
        BranchKV(*inputs[1:7]),
        inputs[7],
        cfg,
        (compress_k, compress_v),
        layout,
        comm,
        ops or default_ops(q),
        softmax_scale,
        fetch or FetchOptions(),
    )
    if plan is None:
        out, block_indices = local_plan.unshard([out]), local_plan.unshard([block_indices])
    if not return_block_indices:
        return out
    if local_plan.block_ids is not None:
        ids = local_plan.block_ids.to(block_indices.device)[block_indices.clamp(min=0).long()]
        block_indices = torch.where(block_indices >= 0, ids, -1).to(torch.int32)
    return out, block_indices


def _attend(
    q: Tensor,
    kv: BranchKV,
    gates: Tensor,
    cfg: NSAConfig,
    compress: tuple[Compress | None, Compress | None],
    layout: RankLayout,
    comm: Comm,
    ops: ModuleType,
    softmax_scale: float,
    fetch: FetchOptions,
) -> tuple[Tensor, Tensor]:
    """The algorithm, on one rank's padded shard."""
    k_cmp_rows, v_cmp_rows, k_win, v_win = exchange_halos(
        [
            (kv.k_cmp, layout.cmp_halo),
            (kv.v_cmp, layout.cmp_halo),
            (kv.k_win, layout.win_halo),
            (kv.v_win, layout.win_halo),
        ],
        comm,
    )
    k_cmp, v_cmp = gather_compressed(
        _compress(compress[0], k_cmp_rows, cfg, layout, ops),
        _compress(compress[1], v_cmp_rows, cfg, layout, ops),
        layout,
        comm,
    )
    out_cmp, lse_cmp = ops.compressed_attention(
        q, k_cmp, v_cmp, layout.cmp_begin, layout.cmp_end, softmax_scale=softmax_scale
    )
    block_indices = ops.select_blocks(
        q.detach(),
        k_cmp.detach(),
        lse_cmp.detach(),
        layout.cmp_begin,
        layout.cmp_end,
        layout.position,
        layout.doc_start,
        softmax_scale=softmax_scale,
        cmp_block_len=cfg.cmp_block_len,
        cmp_stride=cfg.cmp_stride,
        slc_block_len=cfg.slc_block_len,
        num_slc_blocks=cfg.num_slc_blocks,
        num_init_blocks=cfg.num_init_blocks,
        num_local_blocks=cfg.num_local_blocks,
    )
    out_slc = selected_over_ranks(
        q,
        kv.k_slc,
        kv.v_slc,
        block_indices,
        layout=layout,
        comm=comm,
        ops=ops,
        options=fetch,
        slc_block_len=cfg.slc_block_len,
        softmax_scale=softmax_scale,
    )
    out_win, _ = ops.window_attention(q, k_win, v_win, layout.win_begin, layout.win_end, softmax_scale=softmax_scale)
    return ops.combine(gates, out_cmp, out_slc, out_win), block_indices


def _compress(phi: Compress | None, rows: Tensor, cfg: NSAConfig, layout: RankLayout, ops: ModuleType) -> Tensor:
    if phi is None:
        return ops.compress_mean(rows, layout.cmp_rows, cfg.cmp_block_len)
    if getattr(phi, "takes_rows", False):
        return phi(rows, layout.cmp_block_start, block_rows=layout.cmp_rows, ops=ops)
    index = layout.cmp_rows.long()[:, None] + torch.arange(cfg.cmp_block_len, device=rows.device)
    blocks = rows.index_select(0, index.flatten()).unflatten(0, index.shape)  # [own, l, Hkv, D]
    return phi(blocks, layout.cmp_block_start)


def default_ops(q: Tensor) -> ModuleType:
    """The Triton kernels on a GPU, ATen's attention on a CPU; the reference for fp64 and on other devices."""
    if q.is_cuda and q.dtype != torch.float64:
        import nsa_kernels

        return nsa_kernels
    from nsa_kernels import cpu, reference

    return cpu if q.device.type == "cpu" and q.dtype != torch.float64 else reference


def _agreed_layout(plan: ShardPlan, cfg: NSAConfig, q: Tensor, kv: BranchKV, comm: Comm) -> RankLayout:
    """This rank's layout; the first time, make sure that every rank of the group means the same one."""
    heads = (q.shape[1], kv.k_slc.shape[1], q.shape[2], kv.v_slc.shape[2], q.dtype)

    def compare() -> bool:
        text = repr((plan.cu_seqlens, plan.cp_size, plan.block_len, plan.layout, cfg, heads))
        fingerprint = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return comm.agree(fingerprint)

    if not plan.memo(("agreed", cfg, heads, comm.group), compare):
        raise ValueError(
            f"the ranks of the context-parallel group disagree about the layout: rank {comm.rank} has {plan.layout} "
            f"over cp_size={plan.cp_size} with {plan.num_documents} documents of {plan.num_tokens} tokens and {cfg}; "
            f"every rank needs the same plan, config and head sizes, or tokens would be silently scrambled; build the "
            f"plan from the same cu_seqlens on every rank"
        )
    return rank_layout(plan, cfg, comm.rank, q.device)


def _check_shapes(q: Tensor, kv: BranchKV, gates: Tensor) -> None:
    tokens, num_q_heads, dim_k = q.shape
    num_kv_heads = kv.k_cmp.shape[1]
    for name, x in zip(kv._fields, kv, strict=True):
        dim = dim_k if name.startswith("k") else kv.v_cmp.shape[2]
        if tuple(x.shape) != (tokens, num_kv_heads, dim):
            raise ValueError(
                f"kv.{name} has shape {tuple(x.shape)}, but with q {tuple(q.shape)} it must be "
                f"({tokens}, {num_kv_heads}, {dim}): every branch has a key and a value for every token and kv head"
            )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"{num_q_heads} query heads cannot share {num_kv_heads} kv heads evenly; the kv heads must divide them"
        )
    if tuple(gates.shape) != (tokens, num_q_heads, 3):
        raise ValueError(
            f"gates has shape {tuple(gates.shape)}, but must be ({tokens}, {num_q_heads}, 3): one weight for each "
            f"token, query head and branch (cmp, slc, win)"
        )


def _check_tokens(q: Tensor, expected: int, source: str) -> None:
    if q.shape[0] != expected:
        raise ValueError(
            f"q has {q.shape[0]} tokens, but {source} says {expected}; pass q, kv and gates of that many tokens"
        )


def _check_plan(q: Tensor, plan: ShardPlan, cu_seqlens: Tensor | None, group: dist.ProcessGroup | None) -> None:
    size = 1 if group is None else dist.get_world_size(group)
    if size != plan.cp_size:
        raise ValueError(
            f"the plan is for cp_size={plan.cp_size}, but cp_group has {size} ranks; build the plan with "
            f"cp_size={size} or pass the group of {plan.cp_size}"
        )
    _check_tokens(q, plan.tokens_per_rank, "plan.tokens_per_rank (padding counted: shard with plan.shard)")
    if cu_seqlens is not None and tuple(cu_seqlens.tolist()) != plan.cu_seqlens:
        raise ValueError(
            "cu_seqlens and plan.cu_seqlens differ: the documents the plan was built for are not these; build the "
            "plan from this cu_seqlens, or pass cu_seqlens=None to take the plan's"
        )
