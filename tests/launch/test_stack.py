"""Where a thread is, read by another one, whatever it does."""

import re
import subprocess
import sys
import threading

from nsa_launch.hangs import stack


def test_a_wait_is_told_from_work():
    frames = stack.frames_of(threading.get_ident())
    here = next(told for told in stack.told(frames) if "hangs/stack.py" not in told)
    assert re.fullmatch(r"\S*tests/launch/test_stack.py:\d+ test_a_wait_is_told_from_work", here)
    assert not stack.waits(frames)


def test_a_thread_is_read_while_it_works():
    """Its stack grows and shrinks; an error in it, or a crash, would be the reader's doing."""
    done, failed = threading.Event(), []

    def deeper(n: int) -> int:
        return n and deeper(n - 1) + sum(i for i in range(3))

    def work() -> None:
        try:
            while not done.is_set():
                deeper(60)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        read = [stack.frames_of(thread.ident) for _ in range(200)]
    finally:
        done.set()
        thread.join()
    assert not failed
    assert all("work" in [frame.function for frame in frames] for frames in read)
    assert stack.frames_of(thread.ident) == []


LEAVES = """
import sys, threading
from collections import deque
import torch
from nsa_launch.hangs import stack

class Left:
    def __del__(self):
        goes_last = torch.ones(4)  # lets go of the interpreter while all three functions are being left

def leaves(_):
    goes = Left()

def look(trains, begun):
    begun.wait()
    looks = seen = 0
    while looks < 300 or seen < 100:
        looks += 1
        seen += "__del__" in [frame.function for frame in stack.frames_of(trains)]
    found.append(seen)

found = []
begun = threading.Event()
looker = threading.Thread(target=look, args=(threading.get_ident(), begun))
looker.start()
while looker.is_alive():
    deque(map(leaves, range(100)), 0)  # each an evaluation of its own, called by C
    begun.set()
sys.exit(not found)  # an error ended the looker
"""


def test_a_thread_is_read_while_it_leaves_functions():
    """In a process of its own, as what goes wrong ends it (CPython 3.13, by the text of faulthandler).

    It looks until it has found the thread where it lets go of the interpreter a hundred times.
    """
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
