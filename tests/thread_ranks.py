"""Ranks that are threads of one process: a `Comm` over a barrier, so that eight ranks cost no more than their work.

Only one rank runs at a time, the others wait for their turn: triton's interpreter is not made for threads. A rank's
backward runs in its own thread, on a GPU, too.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from nsa_dist.cp.comm import Comm


class Board:
    """Where the ranks of a group lay down what they send. A rank that fails breaks the barrier for all."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=300)
        self.turn = threading.Lock()
        self.sent: list = [None] * size
        self.order: list[list[str]] = [[] for _ in range(size)]  # kinds in the order in which each rank posted them

    def exchange(self, rank: int, kind: str, sent) -> list:
        """Everybody's `sent`, by rank."""
        self.order[rank].append(kind)
        self.sent[rank] = kind, sent
        self._meet()
        everybody = list(self.sent)
        self._meet()
        kinds = {k for k, _ in everybody}
        assert len(kinds) == 1, f"ranks met in different collectives: {kinds}"
        return [x for _, x in everybody]

    def _meet(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


@dataclass(frozen=True)
class ThreadComm(Comm):
    """Rank `index` of the ranks that share `board`."""

    board: Board = field(default_factory=lambda: Board(1))
    index: int = 0

    @property
    def size(self) -> int:
        return self.board.size

    @property
    def rank(self) -> int:
        return self.index

    def agree(self, value: int) -> bool:
        return True

    def _start_all_gather(self, out, x, kind):
        out.copy_(torch.stack(self.board.exchange(self.index, kind, x)))

    def _start_reduce_scatter(self, out, x, kind):
        parts = self.board.exchange(self.index, kind, x)
        out.copy_(torch.stack([part[self.index] for part in parts]).sum(0))

    def _start_all_to_all(self, out, x, recv_sizes, send_sizes, kind):
        sent = self.board.exchange(self.index, kind, (x, send_sizes))
        assert [sizes[self.index] for _, sizes in sent] == recv_sizes
        out.copy_(torch.cat([x.split(sizes)[self.index] for x, sizes in sent]))


def run_threads(size: int, work: Callable[[ThreadComm], object]) -> list:
    """`work(comm)` on every rank; their results by rank. An exception on any rank is raised here.

    Backward runs in the rank's own thread: torch's has one for each GPU, where a second rank would wait for the first.
    """
    board = Board(size)

    def enter(rank: int):
        with board.turn, torch.autograd.set_multithreading_enabled(False):
            try:
                return work(ThreadComm(board=board, index=rank))
            except BaseException:
                board.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(enter, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
    broken = [error for error in errors if isinstance(error, threading.BrokenBarrierError)]
    for error in [*(e for e in errors if e and e not in broken), *broken]:
        raise error
    return [future.result() for future in futures]
