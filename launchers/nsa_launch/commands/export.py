"""`nsa-dist export`: a run's model as a folder."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nsa_dist.train.refused import Refused


def run(folder: Path, to: Path, step: int | None, tokenizer: Path | None = None) -> None:
    """Write the model into `to`. Refused if that holds something, and as `write`."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refused(f"--to {to} is there and not empty, and nothing is overwritten; name a new folder, or empty it")
    with quiet():
        from nsa_dist.train.export.write import write

        written = write(folder, to, step, tokenizer)
    for notice in written.notices:
        print(f"nsa-dist: {notice}", file=sys.stderr)
    print(f"{to}: {written.kind}, {written.num_weights:,} weights of step {written.step}, {written.dtype}")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, what Megatron-core says of packages that are not installed is not shown."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
