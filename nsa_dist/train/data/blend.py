"""Samples of several token sets, mixed by weight: sample n comes from one of them, a function of the weights and n.

Set i of weight w_i emits its k-th sample at the time (k + 1/2) / w_i, and the blend has them in the order of time, sets
of one time in their order. So after any number of samples each set has had its share, to within one for each set, and
where a run is in each follows from n alone, however many steps there will be.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from nsa_dist.train.data.samples import SampleSource


class Blend:
    """`blend[n]` for n = 0, 1, 2, ...: as `Samples`, of `sets`.

    Blend([web, code], [0.7, 0.3]).place(0) == (0, 0)      # (which set, which of its samples)
    """

    def __init__(self, sets: Sequence[SampleSource], weights: Sequence[float]) -> None:
        assert len(sets) == len(weights) > 0
        exact = [Fraction(repr(float(weight))) for weight in weights]
        common = math.lcm(*(weight.denominator for weight in exact))
        self._sets = sets
        self._weights = [int(weight * common) for weight in exact]

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        which, number = self.place(n)
        return self._sets[which][number]

    def place(self, n: int) -> tuple[int, int]:
        """(set, number of the sample in it) of sample n: exact, in time that does not grow with n."""
        total = sum(self._weights)
        early = max(0, n - len(self._weights))  # by the time early / total at most n samples were emitted
        numbers = [(2 * early * weight + total) // (2 * total) for weight in self._weights]
        following = [(Fraction(2 * k + 1, w), i) for i, (k, w) in enumerate(zip(numbers, self._weights, strict=True))]
        heapq.heapify(following)
        for _ in range(n - sum(numbers)):
            _, which = following[0]
            numbers[which] += 1
            heapq.heapreplace(following, (Fraction(2 * numbers[which] + 1, self._weights[which]), which))
        which = following[0][1]
        return which, numbers[which]
