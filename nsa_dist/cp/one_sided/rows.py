"""Halos and compressed blocks of calls in line: rows are put where others read them, and taken to where they belong.

What `cp.halo` and `cp.gather` do with collectives, in a put, a meeting and a take each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsa_dist.cp.call import Call
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.layout import Halo, RankLayout
from nsa_dist.cp.one_sided.comm import OneSidedComm
from nsa_dist.cp.one_sided.tables import HaloTables, reader_tables
from nsa_kernels.exchange.mailbox import aligned

Pair = tuple[Tensor, Tensor]


def with_halos(cmp: Pair, win: Pair, call: Call) -> tuple[Pair, Pair]:
    """k, v [T, Hkv, D] of two branches with their halos, [E, Hkv, D]: differentiable of cmp, of win not."""
    halos, tables = (call.layout.cmp_halo, call.layout.win_halo), reader_tables(call.layout)

    def body(inputs: list[Tensor]) -> list[Tensor]:
        pairs = ((inputs[0], inputs[1]), (inputs[2], inputs[3]))
        comm = _counted(
            call.comm, "halo", [_bytes(pair, sum(h.send_sizes)) for pair, h in zip(pairs, halos, strict=True)]
        )
        room = [aligned(_bytes(pair, halo.most_sent)) for pair, halo in zip(pairs, halos, strict=True)]
        box = comm.boxes.of("halo", sum(room))
        for pair, halo, offset in zip(pairs, halos, (0, room[0]), strict=True):
            comm.boxes.put_rows(box, *pair, halo.send_rows, offset)
        comm.boxes.meet(box)
        found = [
            comm.boxes.take_rows(box, pair, pair, halo.origin, halo.source_row, offset)
            for pair, halo, offset in zip(pairs, (tables.cmp_halo, tables.win_halo), (0, room[0]), strict=True)
        ]
        return [x for pair in found for x in pair]

    with torch.no_grad():
        k_cmp, v_cmp, k_win, v_win = call.run("halo", body, [*cmp, *win])
    k_rows, v_rows = _Received.apply(call, k_cmp, v_cmp, *cmp)
    return (k_rows, v_rows), (k_win, v_win)


class _Received(torch.autograd.Function):
    """Extended tensors of which halos were exchanged before; backward exchanges their gradients."""

    @staticmethod
    def forward(ctx, call: Call, k_extended: Tensor, v_extended: Tensor, *_: Tensor):
        ctx.call = call
        return k_extended, v_extended

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        call = ctx.call

        def body(grads: list[Tensor]) -> Sequence[Tensor]:
            tables = reader_tables(call.layout).cmp_halo
            return halo_gradients((grads[0], grads[1]), call.layout.cmp_halo, tables, call.comm)

        return None, None, None, *call.run("halo backward", body, list(grads))


def halo_gradients(grads: Pair, halo: Halo, tables: HaloTables, comm: Comm) -> Pair:
    """dk, dv [T, h, D] of own rows, in the dtype of those of their extensions [E, h, D], summed in fp32 or better."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    comm = _counted(comm, "halo.grad", [_bytes(grads, sum(halo.recv_sizes), wide)])
    box = comm.boxes.of("halo.grad", _bytes(grads, halo.most_received, wide))
    comm.boxes.put_rows(box, *grads, halo.recv_rows, widen=True)
    comm.boxes.meet(box)
    dk, dv = (x.new_empty(len(halo.extended_rows), *x.shape[1:]) for x in grads)
    comm.boxes.add_rows(box, grads, (dk, dv), halo.extended_rows, tables.sent_number, tables.sent_table)
    return dk, dv


def gather_compressed(k: Tensor, v: Tensor, layout: RankLayout, comm: Comm) -> Pair:
    """Own compressed blocks [own, Hkv, D] -> those of the sequence [layout.num_cmp_rows, Hkv, D], zero in between."""
    comm = _counted(comm, "compressed", [_bytes((k, v), layout.num_cmp_max)], to_all=True)
    box = comm.boxes.of("compressed", _bytes((k, v), layout.num_cmp_max))
    comm.boxes.put_rows(box, k, v, None)
    comm.boxes.meet(box)
    tables = reader_tables(layout)
    return comm.boxes.take_rows(box, None, (k, v), tables.cmp_origin, tables.cmp_source_row)


def return_compressed(dk: Tensor, dv: Tensor, num_own: int, layout: RankLayout, comm: Comm) -> Pair:
    """Gradients of the gathered [layout.num_cmp_rows, h, D] -> of the own blocks [own, h, D], in the ranks' order."""
    comm = _counted(comm, "compressed.grad", [_bytes((dk, dv), layout.num_cmp_max)], to_all=True)
    box = comm.boxes.of("compressed.grad", _bytes((dk, dv), layout.num_cmp_rows))
    comm.boxes.put_rows(box, dk, dv, None)
    comm.boxes.meet(box)
    k_own, v_own = (x.new_empty(num_own, *x.shape[1:]) for x in (dk, dv))
    tables = reader_tables(layout)
    comm.boxes.add_rows(box, None, (k_own, v_own), None, tables.cmp_own_number, tables.cmp_own_rows)
    return k_own, v_own


def _counted(comm: Comm, kind: str, num_bytes: Sequence[int], to_all: bool = False) -> OneSidedComm:
    assert isinstance(comm, OneSidedComm)
    comm.traffic.add(kind, sum(num_bytes) * (comm.size - 1 if to_all else 1))
    return comm


def _bytes(pair: Pair, num_rows: int, dtype: torch.dtype | None = None) -> int:
    """Of so many rows of k and v side by side."""
    k, v = pair
    return num_rows * k.shape[1] * (k.shape[2] + v.shape[2]) * (dtype or k.dtype).itemsize
