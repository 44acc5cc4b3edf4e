"""The window branch over ranks: about half of its queries need no halo and are attended to while the halo travels.

post halo | interior | halo there | the others, under the all-gather of compressed keys
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_dist.cp.call import Call, Stage, cut
from nsa_dist.cp.halo import extend, fill, gather_gradients, post_halo_gradients


class WindowForward:
    """k [T, Hkv, Dk], v [T, Hkv, Dv] of this rank, all heads. Results do not depend on how queries are cut."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call):
        self._q, self._call, self._halo = q, call, call.layout.win_halo
        self._interior = slice(0, len(q)) if call.comm.size == 1 else call.layout.win_interior
        self._parts: dict[int, Sequence[Tensor]] = {}
        self.k, self.v = (k, v) if call.comm.size == 1 else (extend(x, self._halo) for x in (k, v))

    def attend_interior(self) -> None:
        """The queries that need no halo: all of a lone rank's."""
        if self._interior.start < self._interior.stop:
            self._attend(self._interior, "win[interior]")

    def halo_arrived(self, received_k: Tensor, received_v: Tensor) -> None:
        fill(self.k, self._halo, received_k)
        fill(self.v, self._halo, received_v)

    def attend_rest(self) -> tuple[Tensor, Tensor]:
        """out [T, Hq, Dv], softmax_lse [T, Hq] of all queries."""
        for rows in (slice(0, self._interior.start), slice(self._interior.stop, len(self._q))):
            if rows.start < rows.stop:
                self._attend(rows, f"win[{rows.start}:{rows.stop}]")
        outs, lses = zip(*(self._parts[start] for start in sorted(self._parts)), strict=True)
        self._parts = {}
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))

    def _attend(self, rows: slice, name: str) -> None:
        begin, end = (cut(x, rows) for x in (self._call.layout.win_begin, self._call.layout.win_end))

        def attend(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
            scale = self._call.softmax_scale
            return self._call.ops.window_attention(*inputs, begin, end, softmax_scale=scale, **self._call.tiles)

        with self._call.comm.computing(name, "win"):
            self._parts[rows.start] = self._call.run("window", attend, [cut(self._q, rows), self.k, self.v])


class WholeWindow:
    """k [E, Hkv, Dk], v [E, Hkv, Dv] with their halos, which have come: all queries at once."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Call):
        self._q, self.k, self.v, self._call = q, k, v, call

    def attend_rest(self) -> tuple[Tensor, Tensor]:
        """out [T, Hq, Dv], softmax_lse [T, Hq] of all queries."""
        call = self._call

        def attend(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
            begin, end = call.layout.win_begin, call.layout.win_end
            return call.ops.window_attention(*inputs, begin, end, softmax_scale=call.softmax_scale, **call.tiles)

        out, lse = call.run("window", attend, [self._q, self.k, self.v])
        return out, lse


class WindowBackward:
    """Gradients by head group over the extended k [E, Hkv, Dk], v [E, Hkv, Dv]; the halo's go home at the end."""

    def __init__(self, k: Tensor, v: Tensor, call: Call):
        self._k, self._v, self._call = k, v, call
        self._parts: list[tuple[Tensor, Tensor]] = []

    def run(self, group: Stage, q: Tensor, grad_out: Tensor, gate: Tensor, delta: Tensor, lse: Tensor) -> Tensor:
        """dq of one head group, in the dtype of q; the other tensors are the group's [T, its Hq, ...]."""
        layout = self._call.layout
        with self._call.comm.computing(f"win[{group.number}]", "win"):
            dq, *grads = self._call.ops.window_attention_backward(
                grad_out, gate, delta, lse, q, group.of_keys(self._k), group.of_keys(self._v),
                layout.win_begin, layout.win_end, softmax_scale=self._call.softmax_scale,
                kv_dtype=self._call.sum_dtype(q), **self._call.tiles,
            )  # fmt: skip
        self._parts.append(tuple(grads))
        return dq

    def finish(self) -> list[Tensor]:
        """dk [T, Hkv, Dk], dv [T, Hkv, Dv] of the rank's own rows; fp32 or better over ranks."""
        grads = [torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*self._parts, strict=True)]
        self._parts = []
        if self._call.comm.size == 1:
            return grads
        halo = self._call.layout.win_halo
        if self._call.comm.in_line:
            from nsa_dist.cp.one_sided.rows import halo_gradients
            from nsa_dist.cp.one_sided.tables import reader_tables

            tables = reader_tables(self._call.layout).win_halo
            return list(halo_gradients((grads[0], grads[1]), halo, tables, self._call.comm))
        returned = post_halo_gradients(grads, [halo, halo], self._call.comm).wait()
        return [gather_gradients(dy, halo, rows) for dy, rows in zip(grads, returned, strict=True)]
