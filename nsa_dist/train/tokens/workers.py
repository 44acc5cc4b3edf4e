"""Tasks spread over processes that end with this one, however it ends."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from nsa_dist.train.refused import Refused

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Iterator[R]:
    """`work(task)` of every task, as they come to an end; in this process where one job does.

    Refused as a task raised it; RuntimeError for whatever else ended one, or its process.
    """
    if jobs == 1 or len(tasks) <= 1:
        yield from map(work, tasks)
        return
    left = iter(tasks)
    with ExitStack() as stack:
        busy = [stack.enter_context(_Worker(work)) for _ in range(min(jobs, len(tasks)))]
        for worker in busy:
            worker.pipe.send(next(left))
        while busy:
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                yield worker.result()
                try:
                    worker.pipe.send(next(left))
                except StopIteration:
                    busy.remove(worker)


class _Worker:
    """A spawned process with the only other end of a pipe: it reads the end of the pipe when this process is gone."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not live through a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()

    def result(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(
                f"a process that cut texts into tokens died (exit code {self.process.exitcode}; -9: killed, often for "
                f"memory); finished parts are kept: give the command again, with fewer --jobs or a smaller "
                f"--max-file-bytes"
            ) from None
        if kind == "refused":
            raise Refused(value)
        if kind == "failed":
            raise RuntimeError(f"a process that cut texts into tokens failed:\n{value}")
        return value


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them, and the first process answers it
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", work(task))
        except Refused as refusal:
            answer = ("refused", str(refusal))
        except Exception:
            answer = ("failed", traceback.format_exc())
        try:
            pipe.send(answer)
        except ConnectionError:  # nobody is there any more
            return
