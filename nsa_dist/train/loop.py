"""START HERE: one training run, from configuration to the last checkpoint and the pictures."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from nsa_dist.cp.one_sided.mailboxes import naming_the_missing
from nsa_dist.train import checkpoint
from nsa_dist.train.checkpoint import Position
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.ahead import Ahead
from nsa_dist.train.data.batches import BatchCutter, Datasets, build_datasets, sequence_plan
from nsa_dist.train.data.far import FarContext
from nsa_dist.train.data.packs import Packer
from nsa_dist.train.data.samples import SampleSource
from nsa_dist.train.experts import balance
from nsa_dist.train.export.start import FirstWeights, first_weights
from nsa_dist.train.files import notices
from nsa_dist.train.files.intact import Intact, newest_intact
from nsa_dist.train.files.metrics import MetricsLog
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.files.plots import plot_losses, plot_selection
from nsa_dist.train.files.records import Record, read_metrics
from nsa_dist.train.health.clock import Clock
from nsa_dist.train.health.finite import Patience
from nsa_dist.train.health.monitor import Monitor
from nsa_dist.train.hooks import Hooks
from nsa_dist.train.model import Trainable, build
from nsa_dist.train.prepare import note_settings, prepare_output
from nsa_dist.train.selection import selected_blocks
from nsa_dist.train.step import Evaluation, StepResult, evaluate, train_step
from nsa_dist.train.tasks.score import task_record
from nsa_dist.train.tokens.sets import vocab_size
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
    failure: str | None = None  # why it ended before its time, where starting again would not help


def train(config: TrainConfig, hooks: Hooks, device: torch.device) -> TrainResult:
    """Train as `config` says, from the last checkpoint if `run.resume`. Call it on every process, in any thread.

    torch.distributed must be initialised. Refused (a ValueError, `nsa_dist.train.refused`) for a configuration
    that does not fit the processes, or that cannot start in its output_dir (`nsa_dist.train.prepare`), or if no
    checkpoint of a run to go on with is intact.
    """
    output = OutputDir(config.run.output_dir)
    with entered(config, device) as world, naming_the_missing():
        world.agreed(lambda: prepare_output(config))
        intact = newest_intact(output, world)
        begun = first_weights(config, world) if intact.path is None else FirstWeights()
        if world.is_main:
            for text in (*intact.notices, *begun.notices):
                hooks.on_notice(text)
        datasets = build_datasets(config, output, world)
        with notices.collected(GPTModel.__module__) as texts:
            model = build(config, world, begun.fill)
        if world.is_main:
            for text in notices.not_given_yet(output, texts):
                hooks.on_notice(text)
        packer = Packer(model.config, world) if config.data.is_packed else None
        cutter = BatchCutter(config, world, sequence_plan(config), packer)
        first = Position() if intact.path is None else checkpoint.restore(model, intact.path)
        meter = TrafficMeter(config, cutter.plan, world.cp.rank, world.transport.name == "one_sided")
        monitor = Monitor(config, world, model, cutter)
        run = _Run(config, hooks, output, world, model, cutter, datasets, meter, monitor, Patience(config.run))
        with run.logging(first.step):
            run.report_start(first, intact)
            result = run.steps_from(first, intact.path)
        if not (result.stopped or result.failure):
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
    monitor: Monitor
    patience: Patience
    log: MetricsLog | None = None  # on process 0
    validation_loss: float | None = None
    clock: Clock = field(default_factory=Clock)

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
        run, ask = self.config.run, self.hooks.should_stop
        at, stop, failure, loss = start, False, "", None
        end = start.samples + (run.steps - start.step) * run.global_batch_size
        ahead = Ahead(self.cutter, self.datasets.train, end)
        if at.step == 0:
            self.validate(0)
        while at.step < run.steps and not stop:
            step, first = at.step + 1, self.patience.first_of(at.samples)
            self.hooks.on_phase("step", step)
            meter = self.meter if self.is_logged(step) else replace(self.meter, watched=False)
            with self.clock, self.monitor.watching(step):
                result = train_step(self.model, self.cutter, ahead, first, self.world, meter, ask)
            if result.is_finite:
                self.patience.was_finite()
                loss = result.loss
            else:
                answer, failure = self.answer(Position(step, first), result, path)
                if answer == "rewind":
                    at, path = self.gone_back(step)
                    continue
            failure = failure or self.monitor.drift(step)
            if failure:
                break
            at = Position(step, first + run.global_batch_size)
            stop = result.stop and step < run.steps
            self.report_due(at, result)
            if step % run.eval_interval == 0 or step == run.steps:
                self.validate(step)
            if step % run.checkpoint_interval == 0 or step == run.steps or stop:
                self.hooks.on_phase("checkpoint", step)
                path = checkpoint.save(self.model, self.output, at, run.keep_checkpoints, self.world)
                self.hooks.on_checkpoint(step, path, self.losses(loss))
        checkpointed = None if path is None else str(path)
        return TrainResult(at.step, stop, loss, self.validation_loss, checkpointed, failure or None)

    def answer(self, at: Position, result: StepResult, path: Path | None) -> tuple[str, str]:
        """What is done about a step that is not finite, over the samples from `at.samples` on, and why the run ends."""
        answer, last = self.patience.answer(at.step, at.samples, path is not None), self.config.run.global_batch_size
        samples = [at.samples, at.samples + last - 1]
        found = {"loss": str(result.loss), "grad_norm": str(result.grad_norm)}  # JSON has no word for them
        self.write({"kind": "not_finite", "step": at.step, "samples": samples, **found, "action": answer.action})
        if answer.action != "stop":
            return answer.action, ""
        return "stop", (
            f"step {at.step} is not finite (loss {result.loss:g}, gradient norm {result.grad_norm:g}, over samples "
            f"{samples[0]} to {samples[1]}): {answer.reason}. No weight was moved by it"
        )

    def gone_back(self, step: int) -> tuple[Position, Path | None]:
        """The state of the newest intact checkpoint again, after `step` went wrong."""
        self.hooks.on_phase("rewind", step)
        intact = newest_intact(self.output, self.world)
        if intact.path is None:
            raise RuntimeError(f"{self.output.root} has lost the checkpoint that the run was to go back to")
        return checkpoint.restore(self.model, intact.path), intact.path

    def report_due(self, at: Position, result: StepResult) -> None:
        """The records of a step that are due after it; a step that was left out has none but that."""
        if result.is_finite and self.is_logged(at.step):
            self.report(at, result)
        if self.monitor.is_due(at.step):
            self.write(self.monitor.record(at.step))

    def is_logged(self, step: int) -> bool:
        run = self.config.run
        return step % run.log_interval == 0 or step == run.steps

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
                "head_groups": self.meter.head_groups,
                "head_groups_by_sizes": parallel.head_groups is None,
                "transport": str(self.world.transport),
                "link_gb_per_s": parallel.link_gb_per_s,
            }
        )

    def report(self, position: Position, result: StepResult) -> None:
        """One training record, and those of what was sent for it and of the experts."""
        run = self.config.run
        per_step = run.global_batch_size * run.sequence_length
        steps, seconds = self.clock.lap()
        self.write(
            {
                "kind": "train",
                **position._asdict(),
                "loss": result.loss,
                **({"mtp_loss": result.mtp_loss} if result.mtp_loss else {}),
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "tokens": position.samples * run.sequence_length,
                "tokens_per_s": steps * per_step / seconds,
                "time_s": self.clock.total_s,
                "memory_bytes": _peak_memory_bytes(self.world.device),
            }
        )
        if self.meter.is_on:
            self.write(self.meter.record(position.step, result.traffic))
        if self.config.model.has_experts:
            self.write(balance.record(self.cutter, position.step, result.experts))

    def validate(self, step: int) -> None:
        """One validation record, over the same sequences every time; and one of the tasks, if there are any."""
        self.hooks.on_phase("validation", step)
        found = self._evaluated(self.datasets.validation)
        self.validation_loss = found.loss
        by_position = {str(place): loss for place, loss in found.by_position.items()}
        self.write({"kind": "validation", "step": step, "loss": found.loss, "by_position": by_position})
        if (kept := self.config.run.eval_far_context) is not None:
            whole, scrambled = (
                self._evaluated(FarContext(self.datasets.validation, kept, scrambled)) for scrambled in (False, True)
            )
            losses = {"loss": whole.loss, "loss_scrambled": scrambled.loss} if whole.num_tokens else {}
            self.write({"kind": "far_context", "step": step, "kept": kept, "tokens": whole.num_tokens, **losses})
        if self.config.data.tasks:
            self.write(task_record(self.config, self.model, self.cutter, step, self.world))

    def _evaluated(self, samples: SampleSource) -> Evaluation:
        return evaluate(self.model, self.cutter, samples, self.config.run.eval_batches, self.world)

    def write(self, record: Record) -> None:
        if self.log is not None:
            self.log.write(record)
            self.hooks.on_metrics(record)

    def losses(self, train_loss: float | None) -> dict[str, float]:
        known = {"train_loss": train_loss, "validation_loss": self.validation_loss}
        return {name: loss for name, loss in known.items() if loss is not None}

    def draw(self) -> None:
        """`loss.png`; and `selection.png` of the last NSA layer of process 0's stage, if there is one."""
        if self.world.is_main:
            train, validation = (read_metrics(self.output.metrics, kind) for kind in ("train", "validation"))
            unit = self.config.data.loss_unit
            plot_losses(train, validation, vocab_size(self.config), unit, self.output.root / "loss.png")
        model = self.config.model
        first_stage = model.layer_attentions[: model.num_layers // self.config.parallel.pipeline_model_parallel_size]
        if "nsa" not in first_stage:
            return
        blocks = selected_blocks(self.model, self.cutter, self.datasets.validation, self.world)
        if self.world.is_main and blocks is not None:
            layer = max(n for n, kind in enumerate(first_stage, 1) if kind == "nsa")
            what = "document" if self.config.data.is_packed else "sequence"
            where = f"layer {layer}, first head, a validation {what}"
            plot_selection(blocks, self.config.nsa.sizes(), where, self.output.root / "selection.png")


def _peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: what torch reserved of a GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
