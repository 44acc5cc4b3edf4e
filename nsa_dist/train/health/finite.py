"""Steps whose loss or gradient norm is not finite: found before a weight moves, and what is done about them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron.core.optimizer.optimizer import MegatronOptimizer

from nsa_dist.train.config import RunSection


@contextmanager
def asked_before(optimizer: MegatronOptimizer, may_move: Callable[[float], bool]) -> Iterator[None]:
    """Inside, `optimizer.step()` calls `may_move(gradient norm)` when gradients are ready, and moves nothing on False.

    The rest of it is Megatron's own: copies of gradients, their norm, clipping.
    """
    norms: list[float] = []

    def remembered(norm_of: Callable[..., float]) -> Callable[..., float]:
        def call(*arguments: float) -> float:
            norms.append(norm_of(*arguments))
            return norms[-1]

        return call

    replaced = {name: getattr(optimizer, name) for name in ("get_grad_norm", "clip_grad_norm", "step_with_ready_grads")}

    def step_with_ready_grads() -> bool:
        norm = norms[-1] if norms else replaced["get_grad_norm"]()  # not asked for where nothing is clipped
        return may_move(float(norm)) and replaced["step_with_ready_grads"]()

    for name in ("get_grad_norm", "clip_grad_norm"):
        setattr(optimizer, name, remembered(replaced[name]))
    optimizer.step_with_ready_grads = step_with_ready_grads
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)  # the class's own are seen again


@dataclass(frozen=True)
class Answer:
    """What is done about one such step: "skip", "rewind" or "stop", and why it is no more than that."""

    action: str
    reason: str = ""


@dataclass
class Patience:
    """What `run.not_finite` says, and when it ends: decided from what every rank has seen alike.

    Each rewind needs a later step than the one before it, and skips are counted in a row: neither goes on for ever.
    """

    run: RunSection
    rewound_at: int = 0  # the last step for which the run went back
    in_a_row: int = 0
    passed_over: set[int] = field(default_factory=set)  # first samples of batches that a rewind leaves out

    def first_of(self, samples: int) -> int:
        """The number of the first sample of the next step, behind batches that are left out."""
        while samples in self.passed_over:
            samples += self.run.global_batch_size
        return samples

    def was_finite(self) -> None:
        self.in_a_row = 0

    def answer(self, step: int, first: int, has_checkpoint: bool) -> Answer:
        """To step `step`, over the batch of samples from number `first` on, that is not finite."""
        self.in_a_row += 1
        if self.run.not_finite == "skip":
            most = self.run.not_finite_limit
            if self.in_a_row <= most:
                return Answer("skip")
            return Answer("stop", f"{self.in_a_row} steps in a row were not, and not_finite_limit={most} are skipped")
        if self.run.not_finite == "stop":
            return Answer("stop", "not_finite=stop; skip and rewind go on")
        if not has_checkpoint:
            return Answer("stop", "not_finite=rewind, and there is no checkpoint yet; lower checkpoint_interval")
        if step <= self.rewound_at:
            return Answer("stop", f"the run has gone back for step {self.rewound_at} before, and left its samples out")
        self.rewound_at = step
        self.passed_over.add(first)
        return Answer("rewind")
