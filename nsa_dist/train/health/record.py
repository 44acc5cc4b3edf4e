"""The numbers of a "health" record that need neither torch nor ranks."""

import statistics
from collections.abc import Sequence

from nsa_dist.train.files.records import Record

SLOW = 1.3  # times the median: from here on a rank is named


def work_record(work_s: Sequence[float]) -> Record:
    """Of all ranks' seconds, in the order of ranks; `slowest_ratio` is over their median."""
    slowest = max(range(len(work_s)), key=lambda rank: work_s[rank])
    median = statistics.median(work_s)
    return {
        "work_s": [round(seconds, 6) for seconds in work_s],
        "slowest_rank": slowest,
        "slowest_ratio": work_s[slowest] / median if median else 1.0,
    }
