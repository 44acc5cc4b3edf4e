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
        weights = _weights(cutter)
        totals = _forward_backward(
            model, cutter, batches, partial(_training_step, weights=weights), num_pairs=len(weights), forward_only=False
        )
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


class Evaluation(NamedTuple):
    """Mean losses in nats per token, as in `StepResult`."""

    loss: float
    by_position: dict[int, float]  # of tokens before this place in their documents, and behind the one ahead of it
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: Trainable, cutter: BatchCutter, dataset: SampleSource, num_batches: int, world: World
) -> Evaluation:
    """Over the first `num_batches` global batches of `dataset`."""
    model.module.eval()
    run = cutter.config.run
    places = _places(run.sequence_length)
    step = partial(_evaluation_step, places=places)
    firsts = range(0, num_batches * run.global_batch_size, run.global_batch_size)
    sums = [
        _forward_backward(
            model, cutter, cutter.micro_batches(dataset, n), step, num_pairs=1 + len(places), forward_only=True
        )
        for n in firsts
    ]
    totals = world.sum(torch.stack(sums).sum(0)).tolist()
    loss, *of_places = _means(totals)
    by_position = {place: mean for place, mean in zip(places, of_places, strict=True) if not math.isnan(mean)}
    copies = cutter.config.parallel.tensor_model_parallel_size  # tensor-parallel ranks hold the same tokens
    return Evaluation(loss, by_position, int(totals[1 + len(places)]) // copies)


def _places(length: int) -> list[int]:
    """Powers of two, the last one no less than `length`."""
    return [2**n for n in range(_FIRST_PLACE, max(_FIRST_PLACE, (length - 1).bit_length()) + 1)]


def _weights(cutter: BatchCutter) -> list[float]:
    """Of the losses by depth: the next token, then each layer of multi-token prediction."""
    model = cutter.config.model
    return [1.0, *(model.mtp_loss_scaling_factor / model.num_mtp_layers for _ in range(model.num_mtp_layers))]


def _means(sums: Sequence[float]) -> list[float]:
    """[loss sums, tokens] -> nats a token, of each pair.

    NaN where no token has a label of its own document: nothing can be learnt of such a batch.
    """
    half = len(sums) // 2
    return [loss / tokens if tokens else math.nan for loss, tokens in zip(sums[:half], sums[half:], strict=True)]


def _forward_backward(
    model: Trainable,
    cutter: BatchCutter,
    batches: Iterator[Batch],
    step: Callable,
    num_pairs: int,
    forward_only: bool,
) -> Tensor:
    """[loss sums, tokens] of this process, fp64, `num_pairs` of both; zeros where the stage computes no loss."""
    rows, length = cutter.shape
    micro_losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches,
        model=model.module,
        num_microbatches=cutter.num_micro_batches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    totals = torch.zeros(2 * num_pairs, dtype=torch.float64, device=cutter.world.device)
    return sum((micro["loss"] for micro in micro_losses), totals)


def _training_step(
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


def _evaluation_step(
    batches: Iterator[Batch], model: torch.nn.Module, places: Sequence[int]
) -> tuple[Tensor, Callable]:
    batch = next(batches)
    output = model(
        batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed_seq_params
    )
    return output, partial(_loss_by_place, batch.loss_mask, batch.position_ids, places)


def _loss_by_place(
    loss_mask: Tensor, position_ids: Tensor, places: Sequence[int], token_losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `_loss`, of all tokens and of those of each place."""
    weighed = token_losses.float() * loss_mask
    place = torch.bucketize(position_ids, torch.tensor(places, device=position_ids.device), right=True).flatten()
    here = place == torch.arange(len(places), device=place.device)[:, None]  # [places, tokens]
    report = []
    for x in (weighed, loss_mask):
        report += [x.sum().double()[None], (x.double().flatten() * here).sum(1)]
    return weighed.sum(), loss_mask.sum().to(torch.int), {"loss": torch.cat(report)}
