"""The chain of reads that a step of decoding is held against."""

import torch

from nsa_kernels.decode import chain


def test_each_launch_reads_what_the_one_before_left(device, monkeypatch):
    """One more is left than was read; the last program reads a count that the others have brought to its end."""
    monkeypatch.setattr(chain, "num_multiprocessors", lambda _: 3)
    step = chain.chain(torch.empty(0, device=device))
    for _ in range(2):
        left = step().cpu()
        assert left[:: chain.APART][:3].tolist() == [3, 3, 3]
        assert left[1] == 3
