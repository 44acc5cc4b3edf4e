"""Selected attention over ranks: fetch what was chosen, attend, merge rounds; backward fetches again and sends home.

Memory is the rank's own tokens plus one round's pages, whatever the selection does. With one round (the usual case)
nothing is merged and the result is bit for bit that of one rank.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.fetch import (
    FetchOptions,
    Route,
    chosen_elsewhere,
    exchange_bitmaps,
    plan_rounds,
    return_gradients,
    send_pages,
)
from nsa_dist.cp.layout import RankLayout


@dataclass(frozen=True)
class _Call:
    """What does not change between rounds, nor between forward and backward."""

    layout: RankLayout
    comm: Comm
    ops: ModuleType
    options: FetchOptions
    slc_block_len: int
    softmax_scale: float


def selected_over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    layout: RankLayout,
    comm: Comm,
    ops: ModuleType,
    options: FetchOptions,
    slc_block_len: int,
    softmax_scale: float,
) -> Tensor:
    """q [T, Hq, Dk], own k, v [T, Hkv, D], block_indices int32 [T, Hkv, n] of any rank's blocks -> out [T, Hq, Dv]."""
    call = _Call(layout, comm, ops, options, slc_block_len, softmax_scale)
    if comm.size == 1:
        return ops.selected_attention(
            q, k, v, block_indices, _local_table(k, layout), layout.position,
            slc_block_len=slc_block_len, softmax_scale=softmax_scale,
        )[0]  # fmt: skip
    return _SelectedOverRanks.apply(q, k, v, block_indices, call)


class _SelectedOverRanks(torch.autograd.Function):
    """Pages out, attention, gradients home.

    forward    per round: pages from their owners; (out, lse) of the queries over them, merged with the rounds before
    backward   per round: the same pages again; dq += ..., dk, dv of own blocks, and the gradients of the pages go
               home in fp32, where the owner adds its own first, then ascending ranks, round by round
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, call: _Call):
        wanted = exchange_bitmaps(chosen_elsewhere(block_indices, call.layout), call.comm)
        page_bytes = call.slc_block_len * (k.shape[2] * k.element_size() + v.shape[2] * v.element_size())
        wanted = wanted.cpu()  # the one wait for the device: page counts size the buffers
        rounds = plan_rounds(wanted, call.layout, call.comm.rank, page_bytes, call.options)
        call.comm.traffic.count_union(wanted[call.comm.rank], len(call.layout.local_blocks))
        result, kept = None, []
        for number, route in enumerate(rounds):
            pages = send_pages(k, v, route, call.slc_block_len, call.comm)
            if call.options.keep_pages:
                kept.append(pages)
            part = _attend(q, k, v, block_indices, pages, rounds, number, call)
            result = part if result is None else call.ops.merge(*result, *part)
        assert result is not None
        ctx.call, ctx.rounds = call, rounds
        ctx.save_for_backward(q, k, v, block_indices, *result, *kept)
        return result[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        q, k, v, block_indices, out, lse, *kept = ctx.saved_tensors
        call: _Call = ctx.call
        dtype = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        for number, route in enumerate(ctx.rounds):
            pages = kept[number] if kept else send_pages(k, v, route, call.slc_block_len, call.comm)
            table, ids, remote = _round_inputs(k, block_indices, pages, ctx.rounds, number, call)
            grads = call.ops.selected_attention_backward(
                grad_out, None, delta, lse, q, k, v, ids, table, call.layout.position, **remote,
                slc_block_len=call.slc_block_len, softmax_scale=call.softmax_scale, dtype=dtype,
            )  # fmt: skip
            for total, grad in zip((dq, dk, dv), grads[:3], strict=True):
                total += grad
            home = torch.cat([g.to(dtype) for g in grads[3:]], -1)
            return_gradients(home, dk, dv, route, call.slc_block_len, call.comm)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _attend(q, k, v, block_indices, pages, rounds, number, call: _Call) -> tuple[Tensor, Tensor]:
    table, ids, remote = _round_inputs(k, block_indices, pages, rounds, number, call)
    return call.ops.selected_attention(
        q, k, v, ids, table, call.layout.position, **remote,
        slc_block_len=call.slc_block_len, softmax_scale=call.softmax_scale,
    )  # fmt: skip


def _round_inputs(k: Tensor, block_indices: Tensor, pages: Tensor, rounds: list[Route], number: int, call: _Call):
    """(block_table, block_indices of the blocks that are here in this round, the pages as keyword arguments)."""
    route, num_local = rounds[number], len(call.layout.local_blocks)
    # Own blocks are attended in the first round.
    table = _local_table(k, call.layout) if number == 0 else _empty_table(k, call.layout)
    rows = torch.arange(len(pages), dtype=torch.int32, device=k.device) + num_local
    table[route.recv_head.to(k.device), route.recv_block.to(k.device)] = rows
    ids = block_indices if len(rounds) == 1 else _only_here(block_indices, table)
    return table, ids, {"k_remote": pages[..., : k.shape[-1]], "v_remote": pages[..., k.shape[-1] :]}


def _only_here(block_indices: Tensor, table: Tensor) -> Tensor:
    """The ids whose page is in the table, still ascending with -1 last."""
    head = torch.arange(table.shape[0], device=table.device)[:, None]
    here = (block_indices >= 0) & (table[head, block_indices.clamp(min=0).long()] >= 0)
    none = table.shape[1]
    ids = block_indices.masked_fill(~here, none).sort(-1).values
    return ids.masked_fill(ids == none, -1)


def _empty_table(k: Tensor, layout: RankLayout) -> Tensor:
    return torch.full((k.shape[1], len(layout.block_owner)), -1, dtype=torch.int32, device=k.device)


def _local_table(k: Tensor, layout: RankLayout) -> Tensor:
    """block_table int32 [Hkv, num_blocks] of the pages of this rank's own k and v; -1 for blocks held elsewhere."""
    table = _empty_table(k, layout)
    table[:, layout.local_blocks] = torch.arange(len(layout.local_blocks), dtype=torch.int32, device=k.device)
    return table
