"""One rank of many without the others: what they would send is made up here, in the right amount and shape.

So a rank's share of a million tokens runs on one GPU: its kernels, its memory and its counted bytes are those of a
real rank; the time on the wire is not there, what stands for it is a copy in device memory, traced as `made up`.
"""

from dataclasses import dataclass, field

from torch import Tensor

from nsa_dist.cp.comm import Comm
from nsa_dist.cp.fetch import pack_bits

MADE_UP = "made up"


@dataclass(frozen=True)
class OneOfMany(Comm):
    """A `Comm` of `num_ranks` ranks of which only `own_rank` exists."""

    num_ranks: int = 1
    own_rank: int = 0

    @property
    def size(self) -> int:
        return self.num_ranks

    @property
    def rank(self) -> int:
        return self.own_rank

    def agree(self, value: int) -> bool:
        return True


@dataclass(frozen=True)
class SyntheticComm(OneOfMany):
    """One of many whose exchanges are made up.

    Others' data are copies of the rank's own, but for their bitmaps, which are given: bool [P, num_blocks], row r
    being what rank r would ask for, for every kv head.
    """

    bitmaps: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = None if self.bitmaps is None else tuple(self.bitmaps.shape)
        if shape is not None and (len(shape) != 2 or shape[0] != self.num_ranks):
            raise ValueError(
                f"bitmaps of shape {shape} must be [{self.num_ranks}, num_blocks], one row for each of num_ranks, as "
                f"the other ranks ask for the same blocks for every kv head; leave the heads out"
            )

    def _start_all_gather(self, out: Tensor, x: Tensor, kind: str) -> None:
        with self.computing(f"{MADE_UP} {kind}", MADE_UP):
            out.copy_(self._packed_bitmaps(x) if kind == "bitmap" else x.expand_as(out))

    def _start_reduce_scatter(self, out: Tensor, x: Tensor, kind: str) -> None:
        with self.computing(f"{MADE_UP} {kind}", MADE_UP):
            out.copy_(x[self.rank])

    def _start_all_to_all(
        self, out: Tensor, x: Tensor, recv_sizes: list[int], send_sizes: list[int], kind: str
    ) -> None:
        with self.computing(f"{MADE_UP} {kind}", MADE_UP):
            _repeat_into(out, x)

    def _packed_bitmaps(self, own: Tensor) -> Tensor:
        """uint8 [P, h, bytes] for the h heads of `own`."""
        assert self.bitmaps is not None
        packed = pack_bits(self.bitmaps)[:, None].repeat(1, own.shape[0], 1)
        packed[self.rank] = own
        return packed


def _repeat_into(out: Tensor, x: Tensor, most_copies: int = 64) -> None:
    """Fill the rows of `out` with those of `x`, again and again; with random numbers where `x` has too few."""
    if len(out) > most_copies * len(x):
        out.normal_()
        return
    for start in range(0, len(out), max(1, len(x))):
        part = out[start : start + len(x)]
        part.copy_(x[: len(part)])
