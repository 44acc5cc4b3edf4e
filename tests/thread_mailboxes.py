"""Ranks that are threads and read each other's memory: mailboxes on the CPU, their kernels in triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nsa_dist.cp.one_sided.comm import OneSidedComm
from nsa_dist.cp.one_sided.mailboxes import Mailboxes
from nsa_kernels.exchange.mailbox import Mailbox
from nsa_kernels.exchange.signals import meet
from thread_ranks import Board, ThreadComm, run_threads


class ThreadMailboxes(Mailboxes):
    """Of one of the ranks that share a board. They meet there, so no kernel waits for a thread that cannot run."""

    def __init__(self, board: Board, rank: int) -> None:
        super().__init__(rank, board.size, torch.device("cpu"))
        self._board = board

    def meet(self, box: Mailbox) -> None:
        meet(box, waits=False)
        self._board.exchange(self.rank, "meet", None)
        flags = box.kept[0][: 4 * self.size].view(torch.int32)
        assert (flags >= box.epoch).all(), "somebody's flag is not raised"

    def _make(self, slot_bytes: int) -> Mailbox:
        memory = torch.zeros(Mailbox.total_bytes(slot_bytes) + 16, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 16 :]
        memory[1024:] = 0xFF  # NaN in every format: what nobody put is not to be read
        told = self._board.exchange(self.rank, "box", (memory.data_ptr(), slot_bytes))
        assert len({size for _, size in told}) == 1, f"boxes of different sizes: {told}"
        bases = torch.tensor([address for address, _ in told], dtype=torch.int64)
        return Mailbox(
            bases,
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            self.rank,
            slot_bytes,
            (memory,),
        )


@dataclass(frozen=True)
class ReadingComm(OneSidedComm, ThreadComm):
    """A thread's rank whose collectives are mailboxes."""


def run_readers(size: int, work: Callable[[ReadingComm], object]) -> list:
    """`work(comm)` on every rank; their results by rank."""

    def with_boxes(comm: ThreadComm) -> object:
        boxes = ThreadMailboxes(comm.board, comm.rank)
        return work(ReadingComm(board=comm.board, index=comm.rank, mailboxes=boxes))

    return run_threads(size, with_boxes)
