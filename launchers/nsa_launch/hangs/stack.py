"""Where a thread of this process is, for people and for telling who waits from who works."""

import re
import sys
from pathlib import Path
from types import FrameType

_DEPTH = 8  # frames that are told
_NEAR = 6  # frames from the innermost in which a wait shows
# Files whose functions do nothing but wait for other ranks.
_WAITING = re.compile(r"/(torch/distributed/|nsa_dist/cp/comm\.py|megatron/core/pipeline_parallel/p2p_communication)")
_OURS = re.compile(r"/(nsa_dist|nsa_launch|nsa_kernels)/")


def frames_of(thread: int) -> list[FrameType]:
    """Of the thread with this ident, innermost first; those of autograd's own thread while that runs our backward."""
    stacks = {ident: _frames(frame) for ident, frame in sys._current_frames().items()}
    mine = stacks.get(thread, [])
    if mine and mine[0].f_code.co_name == "_engine_run_backward":
        others = [frames for ident, frames in stacks.items() if ident != thread and any(map(_is_backward, frames))]
        return max(others, key=len, default=mine)
    return mine


def told(frames: list[FrameType]) -> list[str]:
    """`nsa_dist/cp/comm.py:90 wait` and so on, innermost first."""
    return [f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}" for frame in frames[:_DEPTH]]


def waits(frames: list[FrameType]) -> bool:
    """Whether the thread is in a collective, as far as Python sees."""
    return any(_WAITING.search(Path(frame.f_code.co_filename).as_posix()) for frame in frames[:_NEAR])


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_backward(frame: FrameType) -> bool:
    return "backward" in frame.f_code.co_name and _OURS.search(frame.f_code.co_filename) is not None


def _short(filename: str) -> str:
    """A path from its package on."""
    parts = Path(filename).parts
    for root in ("site-packages", "launchers", "kernels"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) :])
    return "/".join(parts[-3:])
