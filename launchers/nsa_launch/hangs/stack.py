"""Where a thread of this process is, for people and for telling who waits from who works.

Read from `faulthandler`'s text: it walks the stacks in C without letting go of the interpreter, and takes hold of no
frame. Frames of `sys._current_frames()`, walked while their threads went on, have crashed a training process (CPython
3.11.7).
"""

import faulthandler
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_DEPTH = 8  # frames that are told
_NEAR = 6  # frames from the innermost in which a wait shows
# Files whose functions do nothing but wait for other ranks.
_WAITING = re.compile(r"/(torch/distributed/|nsa_dist/cp/comm\.py|megatron/core/pipeline_parallel/p2p_communication)")
_OURS = re.compile(r"/(nsa_dist|nsa_launch|nsa_kernels)/")


_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class Frame(NamedTuple):
    file: str
    line: int
    function: str


def frames_of(thread: int) -> list[Frame]:
    """Of the thread with this ident, innermost first; those of autograd's own thread while that runs our backward."""
    stacks = _stacks()
    mine = stacks.get(thread, [])
    if mine and mine[0].function == "_engine_run_backward":
        others = [frames for ident, frames in stacks.items() if ident != thread and any(map(_is_backward, frames))]
        return max(others, key=len, default=mine)
    return mine


def _stacks() -> dict[int, list[Frame]]:
    """By the thread's ident, 100 frames of 100 threads at most. None on a disk that is full."""
    with suppress(OSError), tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as text:
        faulthandler.dump_traceback(text, all_threads=True)
        text.seek(0)
        found: dict[int, list[Frame]] = {}
        frames: list[Frame] = []
        for line in text:
            if thread := _THREAD.match(line):
                frames = found[int(thread[1], 16)] = []
            elif frame := _FRAME.match(line):
                frames.append(Frame(frame[1], int(frame[2]), frame[3]))
        return found
    return {}


def told(frames: list[Frame]) -> list[str]:
    """`nsa_dist/cp/comm.py:90 wait` and so on, innermost first."""
    return [f"{_short(frame.file)}:{frame.line} {frame.function}" for frame in frames[:_DEPTH]]


def waits(frames: list[Frame]) -> bool:
    """Whether the thread is in a collective, as far as Python sees."""
    return any(_WAITING.search(Path(frame.file).as_posix()) for frame in frames[:_NEAR])


def _is_backward(frame: Frame) -> bool:
    return "backward" in frame.function and _OURS.search(frame.file) is not None


def _short(filename: str) -> str:
    """A path from its package on."""
    parts = Path(filename).parts
    for root in ("site-packages", "launchers", "kernels"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) :])
    return "/".join(parts[-3:])
