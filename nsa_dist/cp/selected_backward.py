"""The selected branch's backward over ranks: pages again, gradients of the blocks that are here, pages' gradients home.

    post pages(r + 1) | work on round r | post pages.grad(r) | wait for pages.grad(r - 1), which had round r to travel

Rounds run through all head groups in turn; the first fetch is posted before anything else is computed. dK and dV of
own blocks come first, then those of other ranks in ascending order, in fp32 or better: bits repeat from run to run.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from nsa_dist.cp.call import Call, Stage
from nsa_dist.cp.comm import Handle
from nsa_dist.cp.device import Side
from nsa_dist.cp.pages import Fetched, only_here, page_arguments, page_table, round_name
from nsa_dist.cp.sent.routes import Route
from nsa_dist.cp.sent.travel import GoingHome, post_pages


class SelectedBackward:
    """k [T, Hkv, Dk], v [T, Hkv, Dv]; the rounds of every head group and, if they were kept, the pages of each."""

    def __init__(
        self, k: Tensor, v: Tensor, groups: list[Stage], rounds: list[list[Route]], kept: Sequence[Tensor], call: Call
    ):
        self._k, self._v, self._call = k, v, call
        self._kept = list(kept)
        page_bytes = call.cfg.slc_block_len * (k.shape[2] + v.shape[2]) * k.element_size()
        domain_size = call.domains.size
        self._ahead = call.fetch.fetches_ahead(page_bytes, domain_size)
        # What is passed on waits for what enters the domain, and nobody else is to.
        self._side = Side(k.device) if domain_size > 1 else None
        self._rounds = dict(zip([group.number for group in groups], rounds, strict=True))
        self._to_post = [(g, n, route) for g, of in zip(groups, rounds, strict=True) for n, route in enumerate(of)]
        self._under_way: list[Handle] = []
        self._going_home: list[tuple[GoingHome, int]] = []
        self._grads: dict[int, list[Tensor]] = {}  # dk, dv of each group's heads

    def post_next(self) -> None:
        """Start the fetch of the next round, if there is one and its pages were not kept."""
        if self._to_post and not self._kept:
            group, number, route = self._to_post.pop(0)
            name = round_name("pages", group, number)
            k, v = group.of_keys(self._k), group.of_keys(self._v)
            if self._side is not None:
                self._side.follow()
            with nullcontext() if self._side is None else self._side.entered():
                self._under_way.append(post_pages(k, v, route, self._call.cfg.slc_block_len, self._call.comm, name))

    def start(self) -> None:
        """Post the first fetch."""
        if self._ahead:
            self.post_next()

    def run(
        self, group: Stage, q: Tensor, grad_out: Tensor, gate: Tensor, delta: Tensor, lse: Tensor, block_indices: Tensor
    ) -> Tensor:
        """dq of one head group, rounded once to the dtype of q; the other tensors are the group's [T, its Hq, ...]."""
        total, rounds = None, self._rounds[group.number]
        local = group.of_keys(self._k), group.of_keys(self._v)
        for number, route in enumerate(rounds or [None]):
            here = [] if route is None else [Fetched(self._receive(), route)]
            table = page_table(group, self._k, here, self._call.layout, own=number == 0)
            all_here = len(rounds) <= 1
            ids = block_indices if all_here else only_here(block_indices, table)
            with self._call.comm.computing(round_name("slc", group, number), "slc"):
                dq, dk, dv, *remote = self._call.ops.selected_attention_backward(
                    grad_out, gate, delta, lse, q, *local, ids, dtype=self._call.sum_dtype(q),
                    **page_arguments(group, self._k, here, table, self._call, all_here=all_here),
                )  # fmt: skip
            total = dq if total is None else total.add_(dq)
            self._add_own(group.number, dk, dv)
            if route is not None:
                if self._side is not None:
                    self._side.follow()
                del here
                self._send_home(torch.cat(remote, -1), group, number, route)
        assert total is not None
        return total.to(q.dtype)

    def finish(self) -> list[Tensor]:
        """dk [T, Hkv, Dk], dv [T, Hkv, Dv] of own rows, when all has come home: fp32 or better over ranks."""
        while self._going_home:
            self._going_home = self._a_step(self._going_home)
        return [torch.cat(x, 1) if len(x) > 1 else x[0] for x in zip(*self._grads.values(), strict=True)]

    def _receive(self) -> Tensor:
        """The pages of the round at hand, and the next round's fetch under way."""
        if self._kept:
            return self._kept.pop(0)
        self.post_next()  # ahead: of the round after this one
        return self._under_way.pop(0).wait()

    def _add_own(self, group: int, dk: Tensor, dv: Tensor) -> None:
        if group not in self._grads:
            self._grads[group] = [dk, dv]
        else:
            for total, grad in zip(self._grads[group], (dk, dv), strict=True):
                total += grad

    def _send_home(self, grad: Tensor, group: Stage, number: int, route: Route) -> None:
        name = round_name("pages.grad", group, number)
        before = self._going_home
        going = GoingHome(grad, route, self._call.cfg.slc_block_len, self._call.comm, name)
        self._going_home = [*self._a_step(before), (going, group.number)]

    def _a_step(self, going_home: list[tuple[GoingHome, int]]) -> list[tuple[GoingHome, int]]:
        """Each goes on; those that are not there yet."""
        return [(going, group) for going, group in going_home if not going.go_on(*self._grads[group])]
