"""What Ray says of a failure, in one plain line, and what kind of failure it is. Ray is imported when asked for."""

import re
from typing import Any

from nsa_launch.run_folder import OUT_OF_MEMORY, PROCESS_DIED

LONGEST = 160  # characters of a reason in `launches.jsonl` and on the console
_ESCAPES = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")


def plain(text: str, longest: int = LONGEST) -> str:
    """One line without a terminal's escape codes, cut between words with `...` for what is left out."""
    words = " ".join(_ESCAPES.sub("", text).split())
    words = "".join(character for character in words if character.isprintable())
    return words if len(words) <= longest else f"{words[: longest - 4].rsplit(' ', 1)[0]} ..."


def reason(error: BaseException) -> str:
    """Why a rank failed: OUT_OF_MEMORY, PROCESS_DIED, or the last line of its exception."""
    import ray.exceptions

    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(_inner(error), ray.exceptions.RayActorError):
        return PROCESS_DIED
    lines = [line for line in map(plain, str(error).splitlines()) if line]
    return lines[-1] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Ray's memory monitor has killed the process, which Ray says in two ways."""
    import ray.exceptions

    inner = _inner(error)
    return isinstance(inner, ray.exceptions.OutOfMemoryError) or (
        isinstance(inner, ray.exceptions.RayActorError) and "due to the node running low on memory" in str(inner)
    )


def controller_died(error: BaseException | None) -> bool:
    """`fit()` raised because Ray Train's controller is gone, not because of the ranks."""
    import ray.exceptions

    return isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError)


def _inner(error: BaseException) -> Any:
    """A health check's own finding, or what the controller met while it started ranks."""
    for name in ("health_check_failure", "controller_failure"):
        error = getattr(error, name, None) or error
    return error
