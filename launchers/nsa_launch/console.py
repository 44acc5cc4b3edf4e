"""What a person sees of a run: its milestones, its progress, and at the end where everything is.

It reads the run's files and nothing else, so it shows the same wherever the ranks are.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from nsa_dist.train.files.records import MetricsFollower, Record, read_metrics
from nsa_dist.train.health.record import SLOW
from nsa_launch.config import RunConfig
from nsa_launch.hangs.watch import HangWatch
from nsa_launch.progress import TrainProgress, answers, losses
from nsa_launch.ranks import output as rank_output
from nsa_launch.run_folder import MORE_MEMORY, OUT_OF_MEMORY, PROCESS_DIED, RunFolder
from nsa_launch.terminal import Terminal

_RANKS_SHOWN = 2  # of those that failed: one dead rank takes all others with it
_LINE_INTERVAL_S = 10.0  # between lines of progress, where no bar can be drawn


class Console:
    """Follows `launches.jsonl` and `metrics.jsonl` of one run and shows what is new in them.

    ranks_speak     the rank that an event is about says it, as under torchrun
    """

    def __init__(self, config: RunConfig, folder: RunFolder, ranks_speak: bool = False) -> None:
        self._config = config
        self._folder = folder
        self._ranks_speak = ranks_speak
        self._terminal = Terminal(highlight=False, soft_wrap=True)
        self._stack = ExitStack()
        self._progress: TrainProgress | LineProgress | None = None
        self._events, self._metrics = MetricsFollower(folder.launches), MetricsFollower(folder.output.metrics)
        for follower in (self._events, self._metrics):
            follower.poll()  # what earlier launches wrote is not news
        self._hangs = HangWatch(config.launch, folder)
        self._num_incomplete = 0  # records that lack what is to be shown of them
        self._num_failures = 0
        self._world_size = config.world_size
        self._slow: set[int] = set()  # ranks that were named as that
        self.ranks_are_up = False
        self.milestones: set[str] = set()  # "event start", "record train" and so on, of this launch
        self.refusal = ""  # what a rank found wrong with the configuration

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._say_skipped()

    def say(self, text: str) -> None:
        """Lines above the progress bar."""
        self._terminal.print(text, markup=False)

    def update(self) -> None:
        """Show what has been written since the last call."""
        for event in self._events.poll():
            self.milestones.add(f"event {event.get('event')}")
            self._show(self._show_event, event)
        for record in self._metrics.poll():
            self.milestones.add(f"record {record.get('kind')}")
            self._show(self._show_record, record)

    def watch(self) -> None:
        """Say if the run stands still, and write it down."""
        standstill = self._hangs.poll() if self.ranks_are_up else None
        if standstill is not None:
            self._folder.record("standstill", lines=standstill.lines)
            self.say("\n".join(standstill.lines))

    def _show(self, show: Callable[[Record], None], record: Record) -> None:
        """A spoiled record takes nothing away but its own line: the ranks do not depend on what is shown."""
        try:
            show(record)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration):
            self._num_incomplete += 1

    def _say_skipped(self) -> None:
        for follower, path in ((self._events, self._folder.launches), (self._metrics, self._folder.output.metrics)):
            if follower.num_skipped:
                self.say(f"{path} has {follower.num_skipped} lines that are no records; they were passed over")
        if self._num_incomplete:
            self.say(f"{self._num_incomplete} records of this launch lack what is shown of them; they were passed over")

    def _show_record(self, record: Record) -> None:
        if record["kind"] == "start":
            self._show_start(record)
        elif record["kind"] == "health":
            self._show_slow(record)
        elif record["kind"] == "not_finite":
            self._show_not_finite(record)
        else:
            self._bar().feed(record)

    def _bar(self) -> "TrainProgress | LineProgress":
        if self._progress is None:
            steps = self._config.run.steps
            if self._terminal.is_terminal:
                self._progress = self._stack.enter_context(TrainProgress(steps, self._terminal))
            else:
                self._progress = LineProgress(self, steps)
        return self._progress

    def _show_event(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "launch":
            self.ranks_are_up = False
        elif kind == "start":
            self.ranks_are_up, self._world_size = True, event["world_size"]
            self.say(f"{event['world_size']} ranks are up, training from step {event['step']}")
        elif kind in ("failure", "out_of_memory") and self._ranks_speak:
            return
        elif kind == "failure":
            self.ranks_are_up = False
            self._num_failures += 1
            self.say(f"{_culprits(event['ranks'], event.get('hung'))}; {self._consequence()}")
        elif kind == "out_of_memory":
            self._show_shortage(event)
        elif kind == "notice":
            self.say(f"note: {event['text']}")
        elif kind == "refused":
            self.refusal = event["reason"]

    def _show_shortage(self, event: Mapping[str, Any]) -> None:
        """Of the first rank of an attempt: the others hold as much, or lost their partner."""
        if self.ranks_are_up:
            from nsa_launch.memory import shown  # the planner, which other runs do not need

            self.ranks_are_up = False
            self.say("\n".join(shown.lines(self._config, event, self._world_size)))

    def _show_slow(self, record: Record) -> None:
        """Once for each rank: a step later it is no news."""
        rank, ratio = record["slowest_rank"], record["slowest_ratio"]
        if ratio >= SLOW and rank not in self._slow:
            self._slow.add(rank)
            self.say(
                f"rank {rank} is slow: in step {record['step']} it worked {record['work_s'][rank]:.3g} s, {ratio:.2f} "
                f"times the median of the ranks (waiting for others left out); topology.json says where it runs"
            )

    def _show_not_finite(self, record: Record) -> None:
        done = {"skip": "left out", "rewind": "gone back to the last checkpoint for", "stop": "the end of the run"}
        self.say(
            f"step {record['step']} is not finite (loss {record['loss']}, gradient norm {record['grad_norm']}, over "
            f"samples {record['samples'][0]} to {record['samples'][1]}): {done[record['action']]}"
        )

    def _show_start(self, record: Record) -> None:
        for key, (old, new) in record.get("changed", {}).items():
            self.say(f"{key}: {old} at the last start, {new} now")
        if record["context_parallel_size"] > 1:
            link, domain = record.get("link_gb_per_s"), record.get("domain_size")
            self.say(
                f"{record['context_parallel_size']} context-parallel ranks, {record['layout']}, load imbalance "
                f"{record['load_imbalance']:.2f}; kv_fetch_budget_bytes={record['kv_fetch_budget_bytes']}, "
                f"whole_shard_fraction={record['whole_shard_fraction']:.3g}"
                f"{f' for links of {link:g} GB/s' if link else ''}, keep_pages={record['keep_pages']}, "
                f"head_groups={record['head_groups'] or 'auto'}"
                f"{' by sizes' if record.get('head_groups_by_sizes') else ''}"
                f"{f', domains of {domain} ranks' if domain else ''}"
            )
            if "transport" in record:  # not in records of earlier versions
                self.say(f"transport: {record['transport']}")

    def _consequence(self) -> str:
        allowed = self._config.launch.max_failures
        if self._num_failures > allowed:
            return f"that was one failure more than launch.max_failures={allowed}"
        return f"all ranks start again from the last checkpoint ({self._num_failures} of {allowed} times)"

    def finish(self, ended: Mapping[str, Any]) -> None:
        """The last words of a run whose ranks came to an end: how far, how good, and where everything is."""
        self._stack.close()
        output = self._folder.output
        stopped = ended["stopped"]
        failure = ended.get("failure")
        if failure:
            self.say(f"the run ended, and starting it again as it is would not help: {failure}")
        done = "stopped after" if stopped else "failed after" if failure else "finished"
        self.say(f"{done} step {ended['step']} of {self._config.run.steps}")
        validation = read_metrics(output.metrics, "validation")
        if len(validation) > 1:
            first, last = validation[0], validation[-1]
            self.say(
                f"validation loss {first['loss']:.4f} (step {first['step']}) -> {last['loss']:.4f} "
                f"(step {last['step']}), {self._config.data.loss_unit}"
            )
        for record in read_metrics(output.metrics, "tasks")[-1:]:
            self._show(lambda tasks: self.say(f"answers      {answers(tasks)} (step {tasks['step']})"), record)
        for record in read_metrics(output.metrics, "traffic")[-1:]:
            self._show(lambda traffic: self.say(f"traffic      {_traffic(traffic)}"), record)
        self.say(f"metrics      {output.metrics}, and TensorBoard: tensorboard --logdir {output.tensorboard}")
        pictures = [str(path) for path in sorted(output.root.glob("*.png"))]
        if pictures:
            self.say(f"plots        {' '.join(pictures)}")
        self.say(f"checkpoints  {output.checkpoints}")
        self._report()
        if stopped:
            self.say("go on with   the same command and resume=true")

    def _report(self) -> None:
        """Write the report. No run fails of what is only told about it."""
        try:
            from nsa_launch.report import (
                page,  # not before there is something to draw: what it draws with takes seconds
            )

            path = page.write(self._folder)
        except Exception as error:
            again = f"nsa-dist report {self._folder.path}"
            self.say(f"report       could not be written ({type(error).__name__}: {error}); {again} tries again")
        else:
            self.say(f"report       {path}")

    def show_failure(self, failures: Mapping[int, BaseException]) -> None:
        """The ends of the files of ranks that failed for good."""
        self._stack.close()
        for rank in sorted(failures)[:_RANKS_SHOWN]:
            path = self._folder.rank_log(rank)
            self.say(f"--- rank {rank}: the end of {path}\n{rank_output.tail(path)}")
        ranks = ", ".join(map(str, sorted(failures)))
        self._report()
        self.say(f"--- training failed on ranks {ranks}; what every rank wrote is in {self._folder.logs}")


def _culprits(ranks: Mapping[str, str], hung: Mapping[str, str] | None = None) -> str:
    """The ranks that hung or died, or else the first that raised: the others only lost their partners."""
    if hung:
        return ", ".join(f"rank {rank} {why}" for rank, why in hung.items())
    killed = [f"rank {rank}" for rank, reason in ranks.items() if reason == OUT_OF_MEMORY]
    if killed:
        return f"{', '.join(killed)}: {OUT_OF_MEMORY}; if it comes again, {MORE_MEMORY}"
    dead = [f"rank {rank}" for rank, reason in ranks.items() if reason == PROCESS_DIED]
    if dead:
        return f"{', '.join(dead)} died"
    rank, reason = next(iter(ranks.items()))
    return f"rank {rank} failed: {reason}"


def _traffic(record: Record) -> str:
    """One line of what the context-parallel ranks sent in a step, and how it compares with the closed formulas."""
    sent, formula = (sum(record[name].values()) for name in ("sent_bytes", "formula_bytes"))
    pages = record["sent_bytes"]["pages"] + record["sent_bytes"]["pages.grad"]
    verdict = "as the formulas say" if sent == formula else f"the formulas say {formula / 1e6:,.1f} MB"
    return (
        f"{sent / 1e6:,.1f} MB sent in step {record['step']}, {verdict}; {pages / sent:.0%} of it pages and their "
        f"gradients, {record['union_fraction']:.0%} of the remote blocks chosen; load imbalance "
        f"{record['load_imbalance']:.2f}"
    )


class LineProgress:
    """Progress for files and pipes: lines for each validation, and one every few seconds in between."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps
        self._due_s = 0.0

    def feed(self, record: Record) -> None:
        """Print a record of `metrics.jsonl` when its turn has come."""
        step = f"step {record['step']}/{self._total_steps}"
        if record["kind"] == "validation":
            self._console.say(f"{step}  validation {record['loss']:.4f}")
        elif record["kind"] == "tasks":
            self._console.say(f"{step}  answers {answers(record)}")
        elif record["kind"] == "train" and (time.monotonic() >= self._due_s or record["step"] == self._total_steps):
            self._due_s = time.monotonic() + _LINE_INTERVAL_S
            self._console.say(f"{step}  loss {losses(record)}  {record['tokens_per_s']:,.0f} tokens/s")
