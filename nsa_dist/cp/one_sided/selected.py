"""The selected branch of a call by the transport of its group."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from nsa_dist.cp.call import Call, Stage
from nsa_dist.cp.selected import SelectedForward
from nsa_dist.cp.selected_backward import SelectedBackward


class SelectedOverRanks(Protocol):
    """The steps of a forward, stage by stage: `post_bitmap`, `post_fetch`, `attend`, `release`; then `finish`."""

    kept: list[Tensor]

    def post_bitmap(self, block_indices: Tensor) -> None: ...
    def post_fetch(self, stage: Stage) -> None: ...
    def attend(self, stage: Stage, block_indices: Tensor) -> tuple[Tensor, Tensor]: ...
    def release(self) -> None: ...
    def finish(self) -> list[Any]:
        """What the backward of the same transport needs to know of every head group: tensors where memory is read."""


class SelectedGradients(Protocol):
    """The steps of a backward: `start`, `run` for every head group, `finish`."""

    def start(self) -> None: ...
    def run(
        self, group: Stage, q: Tensor, grad_out: Tensor, gate: Tensor, delta: Tensor, lse: Tensor, block_indices: Tensor
    ) -> Tensor: ...
    def finish(self) -> list[Tensor]: ...


def selected_forward(q: Tensor, k: Tensor, v: Tensor, stages: list[Stage], call: Call) -> SelectedOverRanks:
    if call.comm.reads_memory:
        from nsa_dist.cp.one_sided.pages import PulledForward

        return PulledForward(q, k, v, stages, call)
    return SelectedForward(q, k, v, stages, call)


def selected_backward(
    k: Tensor, v: Tensor, groups: list[Stage], fetched: list[Any], kept: Sequence[Tensor], call: Call
) -> SelectedGradients:
    """fetched      what the forward's `finish` returned"""
    if call.comm.reads_memory:
        from nsa_dist.cp.one_sided.pages import PulledBackward

        return PulledBackward(k, v, groups, fetched, kept, call)
    return SelectedBackward(k, v, groups, fetched, kept, call)
