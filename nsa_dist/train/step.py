"""One optimizer step and one evaluation, over Megatron's forward-backward schedules."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nsa_dist.train.data.ahead import Ahead
from nsa_dist.train.data.batches import Batch, BatchCutter
from nsa_dist.train.data.samples import SampleSource
from nsa_dist.train.experts.balance import Balance
from nsa_dist.train.health.finite import asked_before
from nsa_dist.train.model import Trainable
from nsa_dist.train.traffic import TrafficMeter
from nsa_dist.train.world import World

_FIRST_PLACE = 6  # losses by place in a document: of its first 64 tokens, then up to 128, ...


class StepResult(NamedTuple):
    """Of one step over all ranks: mean loss in nats per token, gradient norm before clipping, the rate used.

    Tokens count by their `loss_mask`, which is 1 in texts and a whole number or 0 in tasks.

    Where loss or norm is not finite, no weight and no state of the optimizer was touched.
    """

    loss: float
    grad_norm: float
    lr: float
    stop: bool
    traffic: list[float]  # the sum of all ranks' tables, for `TrafficMeter.record`
    experts: list[float]  # the same for `nsa_dist.train.experts.balance.record`

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: Trainable,
    cutter: BatchCutter,
    ahead: Ahead,
    first: int,
    world: World,
    meter: TrafficMeter,
    should_stop: Callable[[], bool],
) -> StepResult:
    """One step over the global batch of samples from number `first` on.

    `should_stop` is asked on process 0 and the answer reaches all of them. Whether loss and gradient norm are finite is
    decided from the same sums on every process, before anything moves; the learning rate's schedule moves on even so.
    """
    model.module.train()
    model.module.zero_grad_buffer()
    model.optimizer.zero_grad()
    balance = Balance.begun(model, cutter)
    with meter.counting(model) as counted:
        batches = balance.telling(meter.noting(ahead.micro_batches(first)))
        totals = _forward_backward(model, cutter, batches, forward_only=False)
    ahead.make()  # all is launched, and what follows waits for the device
    lr = model.optimizer.param_groups[0]["lr"]
    tables = [table.to(world.device) for table in (meter.pack(model, counted), balance.pack())]
    results: list[StepResult] = []

    def may_move(grad_norm: float) -> bool:
        told = [float(world.is_main and should_stop()), 0.0 if math.isfinite(grad_norm) else 1.0]
        row = torch.cat([totals, torch.tensor(told, dtype=torch.float64, device=world.device), *tables])
        loss_sum, num_tokens, stop, bad, *rest = world.sum(row).tolist()
        traffic, experts = rest[: len(tables[0])], rest[len(tables[0]) :]
        shown = grad_norm if not bad or not math.isfinite(grad_norm) else math.nan  # another rank's was not finite
        results.append(StepResult(_mean(loss_sum, num_tokens), shown, lr, stop > 0, traffic, experts))
        return results[0].is_finite

    with asked_before(model.optimizer, may_move):
        model.optimizer.step()
    model.scheduler.step(1)
    return results[0]


class Evaluation(NamedTuple):
    """Mean losses in nats per token, as in `StepResult`."""

    loss: float
    by_position: dict[int, float]  # of tokens before this place in their documents, and behind the one ahead of it
    num_tokens: float


@torch.no_grad()
def evaluate(
    model: Trainable, cutter: BatchCutter, dataset: SampleSource, num_batches: int, world: World
) -> Evaluation:
    """Over the first `num_batches` global batches of `dataset`."""
    model.module.eval()
    run = cutter.config.run
    places = _places(run.sequence_length)
    firsts = range(0, num_batches * run.global_batch_size, run.global_batch_size)
    sums = [
        _forward_backward(model, cutter, cutter.micro_batches(dataset, n), forward_only=True, places=places)
        for n in firsts
    ]
    loss_sum, num_tokens, *of_places = world.sum(torch.stack(sums).sum(0)).tolist()
    pairs = zip(places, of_places[: len(places)], of_places[len(places) :], strict=True)
    return Evaluation(
        _mean(loss_sum, num_tokens), {place: one / count for place, one, count in pairs if count}, num_tokens
    )


def _places(length: int) -> list[int]:
    """Powers of two, the last one no less than `length`."""
    return [2**n for n in range(_FIRST_PLACE, max(_FIRST_PLACE, (length - 1).bit_length()) + 1)]


def _mean(loss_sum: float, num_tokens: float) -> float:
    """NaN where no token has a label of its own document: nothing can be learnt of such a batch."""
    return loss_sum / num_tokens if num_tokens else math.nan


def _forward_backward(
    model: Trainable,
    cutter: BatchCutter,
    batches: Iterator[Batch],
    forward_only: bool,
    places: Sequence[int] = (),
) -> Tensor:
    """[loss sum, tokens] of this process, fp64, then the same of each of `places`; zeros where there is no loss."""
    rows, length = cutter.shape
    micro_losses = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, places=places),
        data_iterator=batches,
        model=model.module,
        num_microbatches=cutter.num_micro_batches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    totals = torch.zeros(2 + 2 * len(places), dtype=torch.float64, device=cutter.world.device)
    return sum((micro["loss"] for micro in micro_losses), totals)


def _forward_step(
    batches: Iterator[Batch], model: torch.nn.Module, places: Sequence[int] = ()
) -> tuple[Tensor, Callable]:
    batch = next(batches)
    output = model(
        batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed_seq_params
    )
    return output, partial(_loss, batch.loss_mask, batch.position_ids, places)


def _loss(
    loss_mask: Tensor, position_ids: Tensor, places: Sequence[int], token_losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's form for `calculate_per_token_loss`: the sum over this rank's tokens, and their number."""
    weighed = token_losses.float() * loss_mask
    loss_sum, num_tokens = weighed.sum(), loss_mask.sum()
    report = [loss_sum.detach().double()[None], num_tokens.double()[None]]
    if places:
        place = torch.bucketize(position_ids, torch.tensor(places, device=position_ids.device), right=True).flatten()
        for x in (weighed, loss_mask):
            sums = torch.zeros(len(places), dtype=torch.float64, device=x.device)
            report.append(sums.index_add(0, place, x.detach().double().flatten()))
    return loss_sum, num_tokens.to(torch.int), {"loss": torch.cat(report)}
