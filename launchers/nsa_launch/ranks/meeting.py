"""How the ranks of one attempt meet under torchrun, whose store keeps what earlier attempts wrote into it.

A rank that reads an address of before, of a process that is gone, ends the new attempt as well (torch 2.13: "Gloo
connectFullMesh failed"). torchrun's count of restarts does not tell attempts apart, as it differs between nodes. So
rank 0 draws a name for the attempt, and hands it to every rank that asks:

    rank r     asks/r = a word of its own       waits for answers/WORD = the attempt        came/ATTEMPT/r = ""
    rank 0     answers every word under asks, those of the dead too, until came/ATTEMPT/r is there for every r

Torch's NCCL reads one key past every prefix: a rank whose collective timed out sets it, so that all write down what
they did. In the next attempt it is a timeout again: every process would be ended eight minutes later, and wait for that
when it has trained to its end (torch 2.11). So rank 0 takes it away before it answers.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_LOOK_S = 0.02
_TIMED_OUT = "exception_dump"  # kStoreDumpKey of torch's ProcessGroupNCCL


def store_of_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """`store` under a prefix that no other attempt has. TimeoutError on rank 0 names the ranks that did not come."""
    attempt = _call(store, world_size, timeout) if rank == 0 else _answer(store, rank, timeout)
    return dist.PrefixStore(attempt, store)


def _answer(store: dist.Store, rank: int, timeout: timedelta) -> str:
    word = uuid.uuid4().hex
    store.set(f"asks/{rank}", word)
    store.wait([f"answers/{word}"], timeout)
    attempt = store.get(f"answers/{word}").decode()
    store.set(f"came/{attempt}/{rank}", "")
    return attempt


def _call(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    getattr(store, "_underlying_non_prefix_store", store).delete_key(_TIMED_OUT)
    attempt, missing, answered = uuid.uuid4().hex, set(range(1, world_size)), set[str]()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks/{rank}"]) and (word := store.get(f"asks/{rank}").decode()) not in answered:
                store.set(f"answers/{word}", attempt)
                answered.add(word)
            if store.check([f"came/{attempt}/{rank}"]):
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(
                f"ranks {', '.join(map(str, sorted(missing)))} did not come within {timeout.total_seconds():g} s; see "
                f"what their processes wrote, or give them longer with launch.start_timeout_s"
            )
        time.sleep(_LOOK_S * bool(missing))
    return attempt
