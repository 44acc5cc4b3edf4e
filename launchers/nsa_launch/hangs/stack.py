"""Where a thread of this process is, for people and for telling who waits from who works.

Another thread's stack is read while that thread waits for the interpreter, perhaps in the midst of leaving a function:
a tensor that goes with the function's variables lets go of the interpreter. What can be read then differs:

    CPython 3.11    faulthandler's text, made in C. A frame object made of a frame that is being left dangles (3.11.7)
    from 3.12 on    frame objects, walked and told in one call of C and never held while their thread goes on.
                    faulthandler expects one shim between two evaluations; where a finalizer is left as well there are
                    two, and it follows a wild pointer (3.13.0)
"""

import faulthandler
import re
import sys
import tempfile
from collections import deque
from contextlib import suppress
from itertools import accumulate, chain, repeat, starmap
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

_DEPTH = 8  # frames that are told
_NEAR = 6  # frames from the innermost in which a wait shows
# Files whose functions do nothing but wait for other ranks.
_WAITING = re.compile(r"/(torch/distributed/|nsa_dist/cp/comm\.py|megatron/core/pipeline_parallel/p2p_communication)")
_OURS = re.compile(r"/(nsa_dist|nsa_launch|nsa_kernels)/")


_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_TOLD = attrgetter("f_code.co_filename", "f_lineno", "f_code.co_name")


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
    """By the thread's ident."""
    if sys.version_info < (3, 12):
        return _stacks_of_text()
    idents = list(chain.from_iterable(starmap(sys._current_frames, [()])))
    return {ident: _stack_of_objects(ident) for ident in idents}


def _stack_of_objects(thread: int) -> list[Frame]:
    """In one call, `extend`, within which no other thread runs."""
    innermost = map(itemgetter(thread), starmap(sys._current_frames, [()]))
    frames = accumulate(chain(innermost, repeat("f_back")), getattr)
    found: deque[tuple[str, int, str]] = deque()
    with suppress(AttributeError, KeyError):  # of None, behind the outermost frame; of a thread that has ended
        found.extend(map(_TOLD, frames))
    return [Frame(*each) for each in found]


def _stacks_of_text() -> dict[int, list[Frame]]:
    """100 frames of 100 threads at most. None on a disk that is full."""
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
