"""Ranks of one attempt find each other, whatever earlier attempts left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from nsa_launch.ranks.meeting import store_of_attempt

LONG = timedelta(seconds=300)


def meet(store: dist.Store, world_size: int) -> list[dist.Store]:
    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(lambda rank: store_of_attempt(store, rank, world_size, LONG), range(world_size)))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_attempts_have_a_store_each_that_their_ranks_share(world_size):
    store = dist.HashStore()
    for attempt in ("first", "second", "third"):
        stores = meet(store, world_size)
        assert not stores[-1].check(["address"]), "nothing of the attempt before"
        stores[0].set("address", attempt)
        assert {each.get("address") for each in stores} == {attempt.encode()}


def test_a_timeout_of_an_earlier_attempt_is_none_of_the_next():
    store = dist.HashStore()
    prefixed = dist.PrefixStore("outer", dist.PrefixStore("inner", store))
    for given in (store, prefixed, prefixed):
        store.set("exception_dump", "rank")
        meet(given, 2)
        assert not store.check(["exception_dump"])
    meet(prefixed, 2)  # there need not be one


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    store.set("asks/1", "a word of a rank that has died since")
    with pytest.raises(TimeoutError, match=r"ranks 1, 2 did not come within 0.1 s.*launch.start_timeout_s"):
        store_of_attempt(store, 0, 3, timedelta(seconds=0.1))
