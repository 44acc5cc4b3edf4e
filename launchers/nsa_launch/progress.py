"""A progress bar fed with the records of a run, wherever they come from."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nsa_dist.train.files.records import Record


class TrainProgress:
    """Step, training and validation loss, tokens per second and time left, on one line of the terminal.

    with TrainProgress(total_steps=300) as bar:
        bar.feed(record)                            # of metrics.jsonl, in any number
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("validation {task.fields[validation]}"),
            TextColumn("{task.fields[answers]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, loss="-", validation="-", speed="-", answers=""
        )

    def __enter__(self) -> "TrainProgress":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def feed(self, record: Record) -> None:
        """Show a record; kinds other than "train", "validation" and "tasks" are passed over."""
        if record["kind"] == "train":
            self._progress.update(
                self._task,
                completed=float(record["step"]),
                loss=losses(record),
                speed=f"{record['tokens_per_s']:,.0f}",
            )
        elif record["kind"] == "validation":
            self._progress.update(self._task, validation=f"{record['loss']:.4f}")
        elif record["kind"] == "tasks":
            self._progress.update(self._task, answers=answers(record))


def losses(record: Record) -> str:
    """Of a "train" record: `2.3125`, and behind it those of multi-token prediction: `2.3125 (mtp 2.8123, 3.0512)`."""
    ahead = ", ".join("-" if loss is None else f"{loss:.4f}" for loss in record.get("mtp_loss", []))
    return f"{record['loss']:.4f} (mtp {ahead})" if ahead else f"{record['loss']:.4f}"


def answers(record: Record) -> str:
    """Of a "tasks" record, in a few words: `recall 98.0%, copy 31.5%`."""
    return ", ".join(f"{name} {task['accuracy']:.1%}" for name, task in record["tasks"].items())
