"""How often a model answers the tasks: every byte of an answer is the likeliest, given the right bytes before it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.batches import Batch, BatchCutter
from nsa_dist.train.data.packs import Pack
from nsa_dist.train.files.records import Record
from nsa_dist.train.model import Trainable
from nsa_dist.train.tasks.source import TaskSamples, held_out_samples
from nsa_dist.train.world import World

DEPTHS = 5  # parts of a text in which its evidence may stand


@torch.no_grad()
def task_record(config: TrainConfig, model: Trainable, cutter: BatchCutter, step: int, world: World) -> Record:
    """The "tasks" record of a step: {task: accuracy, number of answers, the same by length, and by depth in it}.

    Over the first `run.eval_batches` global batches of held-out samples at each length. Called on every process.
    """
    model.module.eval()
    tasks = {}
    for task in config.data.tasks:
        by_length = {
            str(length): _counted(model, cutter, held_out_samples(config, task, length), world)
            for length in config.task_lengths
        }
        tasks[task] = {**_accuracy(sum(by_length.values())), "by_length": {n: _of(x) for n, x in by_length.items()}}
    return {"kind": "tasks", "step": step, "tasks": tasks}


def _of(counts: Tensor) -> Record:
    return {**_accuracy(counts), "by_depth": [_accuracy(row[None])["accuracy"] for row in counts]}


def _accuracy(counts: Any) -> Record:
    """counts [depths, (right, all)] -> the share that is right; null where there was no answer."""
    right, asked = counts.sum(0).tolist()
    return {"accuracy": right / asked if asked else None, "answers": int(asked)}


def _counted(model: Trainable, cutter: BatchCutter, samples: TaskSamples, world: World) -> Tensor:
    """[DEPTHS, (right, all)] over all processes, fp64 on the CPU."""
    counts = torch.zeros(DEPTHS, 2, dtype=torch.float64)
    size = cutter.config.run.global_batch_size
    for first in range(0, cutter.config.run.eval_batches * size, size):
        for numbers, right in zip(cutter.numbers(first), _right(model, cutter, samples, first, world), strict=False):
            if parallel_state.get_tensor_model_parallel_rank() or world.cp.rank:
                continue  # all of them hold the same
            for n, row in zip(numbers, right, strict=True):
                for start, drawn in samples.texts(n).items():
                    for answer in drawn.answers:
                        is_right = bool(row[start + answer.start - 1 : start + answer.stop - 1].all())
                        counts[int(answer.depth * DEPTHS)] += torch.tensor([is_right, 1.0], dtype=torch.float64)
    return world.sum(counts.flatten().to(world.device)).cpu().view(DEPTHS, 2)


def _right(model: Trainable, cutter: BatchCutter, samples: TaskSamples, first: int, world: World) -> list[Tensor]:
    """By micro-batch, bool [micro_batch_size, N] on the CPU: whether each label of the sequence is the likeliest token.

    Empty where the pipeline stage computes no logits.
    """
    packs: list[Pack | None] = []

    def noted() -> Iterator[Batch]:
        for batch in cutter.micro_batches(samples, first):
            packs.append(batch.pack)
            yield batch

    rows, length = cutter.shape
    found = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=noted(),
        model=model.module,
        num_microbatches=cutter.num_micro_batches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    shards = [list(world.cp.all_gather(right.T.contiguous(), "metrics")) for right in found]  # [T, b] of each rank
    return [cutter.samples_of(each, pack).bool().cpu() for each, pack in zip(shards, packs, strict=False)]


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    logits = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)
    return logits, partial(_is_likeliest, batch.labels)


def _is_likeliest(labels: Tensor, logits: Tensor, non_loss_data: bool) -> Tensor:
    """labels [b, T], logits [b, T, vocabulary of this tensor-parallel rank] -> uint8 [b, T]."""
    tensor_parallel = Comm(parallel_state.get_tensor_model_parallel_group())
    best, token = logits.float().max(-1)
    token += tensor_parallel.rank * logits.shape[-1]
    if tensor_parallel.size > 1:
        bests, tokens = (tensor_parallel.all_gather(x, "metrics") for x in (best, token))
        token = tokens.gather(0, bests.argmax(0)[None])[0]
    return (token == labels).to(torch.uint8)
