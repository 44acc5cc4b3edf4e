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
from nsa_dist.train.mtp.labels import joined
from nsa_dist.train.traffic import TrafficMeter
from nsa_dist.train.world import World


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
    mtp_loss: list[float | None]  # as `loss`, of each layer of multi-token prediction; None where it had no label

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
        numbers = world.sum(row).tolist()
        loss, *others = _means(numbers[: len(totals)])
        mtp_loss = [None if math.isnan(each) else each for each in others]
        stop, bad, *rest = numbers[len(totals) :]
        traffic, experts = rest[: len(tables[0])], rest[len(tables[0]) :]
        shown = grad_norm if not bad or not math.isfinite(grad_norm) else math.nan  # another rank's was not finite
        results.append(StepResult(loss, shown, lr, stop > 0, traffic, experts, mtp_loss))
        return results[0].is_finite

    with asked_before(model.optimizer, may_move):
        model.optimizer.step()
    model.scheduler.step(1)
    return results[0]


@torch.no_grad()
def evaluate(model: Trainable, cutter: BatchCutter, dataset: SampleSource, num_batches: int, world: World) -> float:
    """Mean loss in nats per token over the first `num_batches` global batches of `dataset`."""
    model.module.eval()
    size = cutter.config.run.global_batch_size
    firsts = range(0, num_batches * size, size)
    sums = [_forward_backward(model, cutter, cutter.micro_batches(dataset, n), forward_only=True) for n in firsts]
    return _means(world.sum(torch.stack(sums).sum(0)).tolist())[0]


def _means(sums: Sequence[float]) -> list[float]:
    """[loss sums, tokens] -> nats a token, by depth.

    NaN where no token has a label of its own document: nothing can be learnt of such a batch.
    """
    depths = len(sums) // 2
    return [loss / tokens if tokens else math.nan for loss, tokens in zip(sums[:depths], sums[depths:], strict=True)]


def _forward_backward(model: Trainable, cutter: BatchCutter, batches: Iterator[Batch], forward_only: bool) -> Tensor:
    """[loss sums by depth, tokens by depth] of this process, fp64; zeros where the pipeline stage computes no loss.

    Depth 0 is the next token, all that an evaluation looks at; those behind it are of multi-token prediction.
    """
    (rows, length), sizes = cutter.shape, cutter.config.model
    depths = 0 if forward_only else sizes.num_mtp_layers
    weights = [1.0] + [sizes.mtp_loss_scaling_factor / depths] * depths if depths else [1.0]
    micro_losses = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, weights=weights),
        data_iterator=batches,
        model=model.module,
        num_microbatches=cutter.num_micro_batches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    totals = torch.zeros(2 * len(weights), dtype=torch.float64, device=cutter.world.device)
    return sum((micro["loss"] for micro in micro_losses), totals)


def _forward_step(
    batches: Iterator[Batch], model: torch.nn.Module, weights: Sequence[float]
) -> tuple[Tensor, Callable]:
    batch = next(batches)
    labels, loss_mask = batch.labels, batch.loss_mask[..., None]
    if len(weights) > 1:
        assert batch.mtp_labels is not None
        assert batch.mtp_loss_mask is not None
        labels, loss_mask = joined(labels, batch.mtp_labels), joined(batch.loss_mask, batch.mtp_loss_mask)
    output = model(batch.tokens, batch.position_ids, None, labels=labels, packed_seq_params=batch.packed_seq_params)
    return output, partial(_loss, loss_mask, weights)


def _loss(
    loss_mask: Tensor, weights: Sequence[float], token_losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's form for `calculate_per_token_loss`: the sum over this rank's tokens, and their number.

    loss_mask [b, T, depths], token_losses the same, or [b, T] of one depth. The number is that of labels of the next
    token, by which DeepSeek-V3 divides the losses of all depths.
    """
    losses = token_losses.float().view(loss_mask.shape)
    depths = list(zip(losses.unbind(-1), loss_mask.unbind(-1), strict=True))
    sums, numbers = [(loss * mask).sum() for loss, mask in depths], [mask.sum() for _, mask in depths]
    report = torch.stack([*(loss.detach().double() for loss in sums), *(number.double() for number in numbers)])
    weighed = [weight * loss for weight, loss in zip(weights, sums, strict=True)]
    return torch.stack(weighed).sum(), numbers[0].to(torch.int), {"loss": report}
