"""The three branches under their gates as one differentiable function, and the order in which ranks work and send.

    forward     post halo | window, interior | phi | post compressed | window, the rest
                stage h:    compressed attention and selection of h | post fetch of h - 1 | selected attention of h - 2
    backward    post fetch of group 0 | deltas of all branches; their outputs are freed
                group h:    compressed | post its gradients | post fetch of h + 1 | selected | post return of h | window
                            the return of h - 1 is waited for after the selected branch of h
                post the window's halo gradients | what is still under way comes home

A stage is a part of the heads (`cp.call`); a group of one rank has one stage and sends nothing. Stages do not share
sums, so outputs and dQ have the same bits for any number of ranks as long as no rounds are merged.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.compress import BlockPlaces, Compress, compress_both
from nsa_dist.cp.call import Call, Stage, forward_stages, head_groups
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.gather import CompressedGather, CompressedReturn
from nsa_dist.cp.halo import extended, post_halos
from nsa_dist.cp.one_sided.counting import count_read
from nsa_dist.cp.one_sided.selected import SelectedOverRanks, selected_backward, selected_forward
from nsa_dist.cp.pages import all_blocks_of
from nsa_dist.cp.sent.routes import Route
from nsa_dist.cp.window import WholeWindow, WindowBackward, WindowForward


class BranchKV(NamedTuple):
    """Keys and values of the three branches, each [T, Hkv, Dk or Dv]. To share one pair, pass it three times."""

    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


def attend(
    q: Tensor, kv: BranchKV, gates: Tensor, compress: tuple[Compress | None, Compress | None], call: Call
) -> tuple[Tensor, Tensor]:
    """One rank's padded shard: out [T, Hq, Dv] and block_indices int32 [T, Hkv, n], ids of the plan's stream."""
    layout, comm = call.layout, call.comm
    comm.enter("forward")
    k_rows, v_rows = kv.k_cmp, kv.v_cmp
    if comm.in_line:
        from nsa_dist.cp.one_sided.rows import with_halos

        rows, in_window = with_halos((kv.k_cmp, kv.v_cmp), (kv.k_win, kv.v_win), call)
        return _after_halos(q, kv, gates, rows, compress, WholeWindow(q, *in_window, call), call)
    with torch.no_grad():
        window = WindowForward(q, kv.k_win, kv.v_win, call)
        if comm.size > 1:
            halos = [layout.cmp_halo, layout.cmp_halo, layout.win_halo, layout.win_halo]
            exchange = post_halos([kv.k_cmp, kv.v_cmp, kv.k_win, kv.v_win], halos, comm)
        window.attend_interior()  # of a lone rank it is the first long kernel: behind it the host gets ahead
        if comm.size > 1:
            received = exchange.wait()
            window.halo_arrived(*received[2:])
    if comm.size > 1:
        k_rows, v_rows = extended([k_rows, v_rows], layout.cmp_halo, received[:2], comm)
    return _after_halos(q, kv, gates, (k_rows, v_rows), compress, window, call)


def _after_halos(
    q: Tensor, kv: BranchKV, gates: Tensor, rows: tuple[Tensor, Tensor],
    compress: tuple[Compress | None, Compress | None], window: WindowForward | WholeWindow, call: Call,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend`, once phi has its `rows` and the window its own."""
    with call.comm.computing("phi", "phi"):
        places = BlockPlaces(call.layout.cmp_rows, call.layout.cmp_block_start, call.cfg.cmp_block_len)
        k_cmp, v_cmp = compress_both(compress, rows, places, call.ops, call.run if call.tapes else None)
    return _Branches.apply(q, k_cmp, v_cmp, kv.k_slc, kv.v_slc, kv.k_win, kv.v_win, gates, window, call)


class _Branches(torch.autograd.Function):
    """Forward and backward of everything after phi. The schedule is at the head of this file.

    k_cmp, v_cmp are the rank's own compressed blocks. k_win and v_win are there for their gradients: `window` holds
    them with their halo, and has attended its interior.
    """

    @staticmethod
    def forward(ctx, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, window, call: Call):
        heads = HeadSizes(q.shape[1], k_slc.shape[1], k_slc.shape[2], v_slc.shape[2], q.itemsize)
        groups = head_groups(heads, len(q), call)
        stages = forward_stages(groups, k_slc.shape[1], call)
        run = _forward_in_line if call.comm.in_line else _forward_overlapped
        out, done = run(q, k_cmp, v_cmp, k_slc, v_slc, gates, window, groups, stages, call)
        ctx.call, ctx.groups, ctx.num_own, ctx.routes = call, groups, len(k_cmp), done.routes
        ctx.num_kept, ctx.num_marks = len(done.kept), len(done.marks)
        ctx.save_for_backward(
            q, *done.compressed, k_slc, v_slc, window.k, window.v, gates, *done.window, *done.parts, *done.kept,
            *done.marks,
        )  # fmt: skip
        if done.marks:
            count_read(done.marks, (k_slc.shape[2], v_slc.shape[2]), k_slc.dtype, call, "pages")
        block_indices = _cat(done.parts[2::5])
        ctx.mark_non_differentiable(block_indices)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros for it
        return out, block_indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, _):
        if grad_out is None:  # nothing depends on the output
            return (None,) * 10
        inputs, call = [grad_out, *ctx.saved_tensors], ctx.call
        if ctx.num_marks:
            kinds = ("pages.grad",) if ctx.num_kept else ("pages.grad", "pages")
            dims = inputs[4].shape[2], inputs[5].shape[2]
            count_read(inputs[-ctx.num_marks :], dims, inputs[4].dtype, call, *kinds)
        ctx.maybe_clear_saved_tensors()  # what `_backward` drops is freed at once, not when it is over
        with torch.autocast(grad_out.device.type, enabled=False):
            return *call.run("backward", lambda inputs: _backward(inputs, ctx), inputs), None, None


class _Done(NamedTuple):
    """What a forward leaves for its backward."""

    compressed: Sequence[Tensor]  # keys and values of the whole sequence
    window: Sequence[Tensor]  # softmax_lse, out
    parts: Sequence[Tensor]  # out_cmp, lse_cmp, block_indices, out_slc, lse_slc of every head group
    kept: Sequence[Tensor]  # fetched pages, if `FetchOptions.keep_pages`
    marks: Sequence[Tensor]  # of every head group, where ranks read each other's pages
    routes: list[list[Route]]  # of every head group, where pages are sent; [[]] of a lone rank


def _forward_overlapped(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, gates: Tensor, window: WindowForward,
    groups: list[Stage], stages: list[Stage], call: Call,
) -> tuple[Tensor, _Done]:  # fmt: skip
    """The schedule at the head of this file. `selected` over ranks is begun first: where ranks read, they put it."""
    over_ranks = selected_forward(q, k_slc, v_slc, stages, call) if call.comm.size > 1 else None
    gather = CompressedGather(k_cmp, v_cmp, call.layout, call.comm)
    out_win, lse_win = window.attend_rest()
    compressed = gather.wait()
    fetched: list[Any] = [[]]
    kept: list[Tensor] = []

    def body(inputs: list[Tensor]) -> list[Tensor]:
        nonlocal fetched, kept
        q, k_slc, v_slc, k_cmp, v_cmp, gates, out_win = inputs
        selected = over_ranks or selected_forward(q, k_slc, v_slc, stages, call)
        results = _forward(q, k_cmp, v_cmp, gates, out_win, groups, stages, selected, call)
        fetched, kept = selected.finish(), selected.kept  # of a lone rank nothing, so a tape need not know
        return results

    out, *parts = call.run("forward", body, [q, k_slc, v_slc, *compressed, gates, out_win])
    marks = fetched if call.comm.reads_memory else []
    return out, _Done(compressed, (lse_win, out_win), parts, kept, marks, [] if marks else fetched)


def _forward_in_line(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, gates: Tensor, window: WholeWindow,
    groups: list[Stage], stages: list[Stage], call: Call,
) -> tuple[Tensor, _Done]:  # fmt: skip
    """One thing after the other, exchanges included, so that all of it can be repeated from a tape."""
    from nsa_dist.cp.one_sided.rows import gather_compressed

    out_win, lse_win = window.attend_rest()

    def body(inputs: list[Tensor]) -> list[Tensor]:
        q, k_slc, v_slc, k_cmp, v_cmp, gates, out_win = inputs
        selected = selected_forward(q, k_slc, v_slc, stages, call)
        compressed = gather_compressed(k_cmp, v_cmp, call.layout, call.comm)
        results = _forward(q, *compressed, gates, out_win, groups, stages, selected, call)
        return [*results, *compressed, *selected.finish(), *selected.kept]

    out, *found = call.run("forward", body, [q, k_slc, v_slc, k_cmp, v_cmp, gates, out_win])
    parts, (k_all, v_all, *rest) = found[: 5 * len(groups)], found[5 * len(groups) :]
    marks, kept = rest[: len(groups)], rest[len(groups) :]
    return out, _Done((k_all, v_all), (lse_win, out_win), parts, kept, marks, [])


def _forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, out_win: Tensor,
    groups: list[Stage], stages: list[Stage], selected: SelectedOverRanks, call: Call,
) -> list[Tensor]:  # fmt: skip
    """out, then out_cmp, lse_cmp, block_indices, out_slc, lse_slc of every head group."""
    cmp: list[tuple[Tensor, Tensor, Tensor]] = []  # out, softmax_lse, block_indices of each stage
    slc: list[tuple[Tensor, Tensor]] = []
    for tick in range(len(stages) + 2):
        if tick < len(stages):
            cmp.append(_attend_and_select(stages[tick], q, k_cmp, v_cmp, call))
        if tick >= 2:
            slc.append(selected.attend(stages[tick - 2], cmp[tick - 2][2]))
        if 1 <= tick <= len(stages):
            selected.post_fetch(stages[tick - 1])
        if tick >= 2:
            selected.release()
        if tick < len(stages):
            selected.post_bitmap(cmp[tick][2])
    out = _combine(stages, gates, cmp, slc, out_win, call)
    of_groups = zip(_by_group(groups, stages, cmp), _by_group(groups, stages, slc), strict=True)
    return [out, *(x for c, s in of_groups for x in (*c, *s))]


def _backward(inputs: list[Tensor], ctx) -> Sequence[Tensor]:
    """The gradients of q to gates, from that of out and what was saved. Empties the list."""
    call, groups = ctx.call, ctx.groups
    call.comm.enter("backward")
    grad_out, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, lse_win, out_win, *rest = inputs
    inputs.clear()
    marks = [rest.pop() for _ in range(ctx.num_marks)][::-1]
    kept = [rest.pop() for _ in range(ctx.num_kept)][::-1]
    selected = selected_backward(k_slc, v_slc, groups, marks or ctx.routes, kept, call)
    selected.start()
    deltas, left = _deltas(groups, grad_out, out_win, rest, call)
    del out_win, rest, kept
    window, compressed = WindowBackward(k_win, v_win, call), []
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group, delta, (lse_cmp, ids, lse_slc) in zip(groups, deltas, left, strict=True):
        queries, grad, gate = (group.of(x) for x in (q, grad_out, gates))
        with call.comm.computing(f"cmp[{group.number}]", "cmp"):
            dq, dk, dv = call.ops.compressed_attention_backward(
                grad, gate[..., 0], delta[..., 0], lse_cmp, queries, group.of_keys(k_cmp),
                group.of_keys(v_cmp), call.layout.cmp_begin, call.layout.cmp_end,
                softmax_scale=call.softmax_scale, kv_dtype=call.sum_dtype(q), **call.tiles,
            )  # fmt: skip
        name = f"compressed.grad[{group.number}]"
        compressed.append(CompressedReturn(dk, dv, ctx.num_own, call.layout, call.comm, name))
        del dk, dv
        dq_slc = selected.run(group, queries, grad, gate[..., 1], delta[..., 1], lse_slc, ids)
        dq_win = window.run(group, queries, grad, gate[..., 2], delta[..., 2], group.of(lse_win))
        call.ops.sum_branches(dq, dq_slc, dq_win, out=group.of(grad_q))
        del dq, dq_slc, dq_win
    grads_win, grads_slc = window.finish(), selected.finish()
    grads_cmp = [_cat(x) for x in zip(*(part.wait() for part in compressed), strict=True)]
    dtype, grad_gates = q.dtype, _cat(deltas).to(gates.dtype)
    return grad_q, *(x.to(dtype) for x in (*grads_cmp, *grads_slc, *grads_win)), grad_gates


def _attend_and_select(stage: Stage, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """out, softmax_lse and block_indices of one stage, from the compressed keys and values of the whole sequence."""
    layout, cfg = call.layout, call.cfg
    queries, keys = stage.of(q), stage.of_keys(k)
    seen = stage.of_rows(layout.cmp_begin), stage.of_rows(layout.cmp_end)
    with call.comm.computing(f"cmp[{stage.number}]", "cmp"):
        out, lse = call.ops.compressed_attention(
            queries, keys, stage.of_keys(v), *seen, softmax_scale=call.softmax_scale, **call.tiles
        )
    block_indices = all_blocks_of(stage, call)
    if block_indices is not None:
        return out, lse, block_indices
    with call.comm.computing(f"select[{stage.number}]", "select"):
        block_indices = call.ops.select_blocks(
            queries, keys, lse, seen[0], stage.of_rows(layout.scored_end),
            stage.of_rows(layout.position), stage.of_rows(layout.doc_start),
            softmax_scale=call.softmax_scale, cmp_block_len=cfg.cmp_block_len, cmp_stride=cfg.cmp_stride,
            slc_block_len=cfg.slc_block_len, num_slc_blocks=cfg.num_slc_blocks,
            num_init_blocks=cfg.num_init_blocks, num_local_blocks=cfg.num_local_blocks,
        )  # fmt: skip
    return out, lse, block_indices


def _combine(stages: list[Stage], gates: Tensor, cmp: list, slc: list, out_win: Tensor, call: Call) -> Tensor:
    """The gated sum [T, Hq, Dv]; stage by stage, so that no branch's parts are put together first."""
    out = torch.empty_like(out_win)
    for stage, (out_cmp, *_), (out_slc, _) in zip(stages, cmp, slc, strict=True):
        call.ops.combine(stage.of(gates), out_cmp, out_slc, stage.of(out_win), out=stage.of(out))
    return out


def _by_group(
    groups: list[Stage], stages: list[Stage], parts: Sequence[tuple[Tensor, ...]]
) -> Sequence[tuple[Tensor, ...]]:
    """Halves of queries put together: backward works on all queries of a head group."""
    if len(groups) == len(stages):
        return parts
    return [tuple(torch.cat(halves) for halves in zip(*parts, strict=True))]


def _deltas(groups: list[Stage], grad_out: Tensor, out_win: Tensor, rest: list[Tensor], call: Call):
    """(deltas [T, Hq of the group, 3] of every group, what is left to save of each); frees the branches' outputs.

    rest    out_cmp, lse_cmp, block_indices, out_slc, lse_slc of each group in turn; empty afterwards
    """
    deltas, left = [], []
    for group in groups:
        out_cmp, lse_cmp, block_indices, out_slc, lse_slc = (rest.pop(0) for _ in range(5))
        outs = out_cmp, out_slc, group.of(out_win)
        with call.comm.computing(f"delta[{group.number}]", "delta"):
            deltas.append(call.ops.gate_deltas(group.of(grad_out), *outs))
        left.append((lse_cmp, block_indices, lse_slc))
    return deltas, left


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Head groups side by side, [T, heads, ...]; one is not copied."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
