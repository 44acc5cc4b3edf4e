"""START HERE: one training run, from configuration to the last checkpoint and the pictures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from nsa_dist.train import checkpoint
from nsa_dist.train.checkpoint import Position
from nsa_dist.train.config import VOCAB_SIZE, TrainConfig
from nsa_dist.train.data.batches import BatchCutter, Datasets, build_datasets, sequence_plan
from nsa_dist.train.files import notices
from nsa_dist.train.files.intact import Intact, newest_intact
from nsa_dist.train.files.metrics import MetricsLog
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.files.plots import plot_losses, plot_selection
from nsa_dist.train.files.records import Record, read_metrics
from nsa_dist.train.hooks import Hooks
from nsa_dist.train.model import Trainable, build
from nsa_dist.train.prepare import note_settings, prepare_output
from nsa_dist.train.selection import selected_blocks
from nsa_dist.train.step import StepResult, evaluate, train_step
from nsa_dist.train.traffic import TrafficMeter
from nsa_dist.train.world import World, entered


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; the same on every process, plain data. Losses are None if no step was made here."""

    step: int
    stopped: bool  # asked to, before the last step
    train_loss: float | None
    validation_loss: float | None
    checkpoint: str | None


def train(config: TrainConfig, hooks: Hooks, device: torch.device) -> TrainResult:
    """Train as `config` says, from the last checkpoint if `run.resume`. Call it on every process, in any thread.

    torch.distributed must be initialised. Refused (a ValueError, `nsa_dist.train.refused`) for a configuration
    that does not fit the processes, or that cannot start in its output_dir (`nsa_dist.train.prepare`), or if no
    checkpoint of a run to go on with is intact.
    """
    output = OutputDir(config.run.output_dir)
    with entered(config, device) as world:
        world.agreed(lambda: prepare_output(config))
        intact = newest_intact(output, world)
        if world.is_main:
            for text in intact.notices:
                hooks.on_notice(text)
        datasets = build_datasets(config, output, world)
        cutter = BatchCutter(config, world, sequence_plan(config))
        with notices.collected(GPTModel.__module__) as texts:
            model = build(config, world)
        if world.is_main:
            for text in notices.not_given_yet(output, texts):
                hooks.on_notice(text)
        start = Position() if intact.path is None else checkpoint.restore(model, intact.path)
        meter = TrafficMeter(config, cutter.plan)
        run = _Run(config, hooks, output, world, model, cutter, datasets, meter)
        with run.logging(start.step):
            run.report_start(start, intact)
            result = run.steps_from(start, intact.path)
        if not result.stopped:
            hooks.on_phase("pictures", result.step)
            run.draw()
        return result


@dataclass
class _Run:
    """The parts of a run and the losses it saw last."""

    config: TrainConfig
    hooks: Hooks
    output: OutputDir
    world: World
    model: Trainable
    cutter: BatchCutter
    datasets: Datasets
    meter: TrafficMeter
    log: MetricsLog | None = None  # on process 0
    validation_loss: float | None = None
    clock: "_Clock" = field(default_factory=lambda: _Clock())

    @contextmanager
    def logging(self, first_step: int) -> Iterator[None]:
        """Inside, process 0 writes records."""
        if not self.world.is_main:
            yield
            return
        with MetricsLog(self.output.metrics, self.output.tensorboard, first_step + 1) as self.log:
            yield

    def steps_from(self, start: Position, path: Path | None) -> TrainResult:
        """The steps from `start`, the checkpoint at `path`, to `run.steps`, with what is due between them."""
        run = self.config.run
        (step, samples), stop, loss = start, False, None
        ask = self.hooks.should_stop
        if step == 0:
            self.validate(0)
        while step < run.steps and not stop:
            self.hooks.on_phase("step", step + 1)
            with self.clock:
                result = train_step(self.model, self.cutter, self.datasets.train, samples, self.world, self.meter, ask)
            step, samples, loss = step + 1, samples + run.global_batch_size, result.loss
            stop = result.stop and step < run.steps
            is_last = step == run.steps
            if step % run.log_interval == 0 or is_last:
                self.report(Position(step, samples), result)
            if step % run.eval_interval == 0 or is_last:
                self.validate(step)
            if step % run.checkpoint_interval == 0 or is_last or stop:
                self.hooks.on_phase("checkpoint", step)
                path = checkpoint.save(
                    self.model, self.output, Position(step, samples), run.keep_checkpoints, self.world
                )
                self.hooks.on_checkpoint(step, path, self.losses(loss))
        return TrainResult(step, stop, loss, self.validation_loss, None if path is None else str(path))

    def report_start(self, start: Position, intact: Intact) -> None:
        """The record of where it goes on, what differs from the last start, and how the sequence is shared."""
        parallel = self.config.parallel
        changed = self.world.agreed(lambda: note_settings(self.output, self.config))
        self.write(
            {
                "kind": "start",
                **start._asdict(),
                **intact.record(),
                "changed": changed,
                "context_parallel_size": parallel.context_parallel_size,
                "layout": parallel.layout,
                "load_imbalance": self.meter.load_imbalance,
                **asdict(parallel.fetch_options()),
                "link_gb_per_s": parallel.link_gb_per_s,
            }
        )

    def report(self, position: Position, result: StepResult) -> None:
        """One training record, and one of what was sent for it."""
        run = self.config.run
        per_step = run.global_batch_size * run.sequence_length
        steps, seconds = self.clock.lap()
        self.write(
            {
                "kind": "train",
                **position._asdict(),
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "tokens": position.samples * run.sequence_length,
                "tokens_per_s": steps * per_step / seconds,
                "time_s": self.clock.total_s,
            }
        )
        if self.meter.is_on:
            self.write(self.meter.record(position.step, result.traffic))

    def validate(self, step: int) -> None:
        """One validation record, over the same sequences every time."""
        self.hooks.on_phase("validation", step)
        self.validation_loss = evaluate(
            self.model, self.cutter, self.datasets.validation, self.config.run.eval_batches, self.world
        )
        self.write({"kind": "validation", "step": step, "loss": self.validation_loss})

    def write(self, record: Record) -> None:
        if self.log is not None:
            self.log.write(record)
            self.hooks.on_metrics(record)

    def losses(self, train_loss: float) -> dict[str, float]:
        validation = {} if self.validation_loss is None else {"validation_loss": self.validation_loss}
        return {"train_loss": train_loss, **validation}

    def draw(self) -> None:
        """`loss.png` and `selection.png`, of the last layer of process 0's stage."""
        layer = self.config.model.num_layers // self.config.parallel.pipeline_model_parallel_size - 1
        blocks = selected_blocks(self.model, self.cutter, self.datasets.validation, layer, self.world)
        if self.world.is_main:
            train, validation = (read_metrics(self.output.metrics, kind) for kind in ("train", "validation"))
            plot_losses(train, validation, VOCAB_SIZE, self.output.root / "loss.png")
            where = f"layer {layer + 1}, first head, a validation sequence"
            plot_selection(blocks, self.config.nsa.sizes(), where, self.output.root / "selection.png")


class _Clock:
    """Seconds spent inside `with clock:`, in all and since the last lap."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._lap_s, self._laps = 0.0, 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        seconds = time.perf_counter() - self._start
        self.total_s += seconds
        self._lap_s += seconds
        self._laps += 1

    def lap(self) -> tuple[int, float]:
        """(times inside, seconds inside) since the last lap."""
        steps, seconds = self._laps, self._lap_s
        self._lap_s, self._laps = 0.0, 0
        return steps, seconds
