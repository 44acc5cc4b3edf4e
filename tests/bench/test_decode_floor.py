"""The chain of reads that a step of decoding is held against: in the interpreter, or on a GPU."""

import torch

from kernels.interpreter import repair
from nsa_dist.bench.decode import floor

if not torch.cuda.is_available():
    repair()


def test_each_launch_reads_what_the_one_before_left(monkeypatch):
    """One more is left than was read; the last program reads a count that the others have brought to its end."""
    monkeypatch.setattr(floor, "num_multiprocessors", lambda _: 3)
    step = floor.chain(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    for _ in range(2):
        left = step().cpu()
        assert left[:: floor.APART][:3].tolist() == [3, 3, 3]
        assert left[1] == 3
