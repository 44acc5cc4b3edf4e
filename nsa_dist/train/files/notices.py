"""What Megatron-core says about itself at every model and every start, so that a run can say it once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nsa_dist.train.files.output import OutputDir


@contextmanager
def collected(logger_name: str) -> Iterator[list[str]]:
    """Inside, warnings of this logger that something is deprecated come into the list instead of being printed."""
    texts: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        is_notice = record.levelno >= logging.WARNING and "deprecated" in record.getMessage().lower()
        if is_notice:
            texts.append(record.getMessage())
        return not is_notice

    logger = logging.getLogger(logger_name)
    logger.addFilter(keep)
    try:
        yield texts
    finally:
        logger.removeFilter(keep)


def not_given_yet(output: OutputDir, texts: list[str]) -> list[str]:
    """Those which this run has not given before; from now on it has. For process 0."""
    marker = output.marker()
    new = [text for text in dict.fromkeys(texts) if text not in marker.notices]
    if new:
        marker.changed(notices=(*marker.notices, *new)).write(output.root)
    return new
