"""Which transport ranks take, what it counts, and what mailboxes do when they grow or are waited for in vain."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cases import SMALL, make_inputs, run
from cp_cases import make_plan
from nsa_dist.cp.comm import Comm, Traffic
from nsa_dist.cp.formulas import cost
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.one_sided import choice, mailboxes
from nsa_dist.cp.one_sided.choice import Transport, decided, transport_of, with_transport
from nsa_dist.cp.one_sided.mailboxes import naming_the_missing
from nsa_dist.cp.options import FetchOptions
from thread_mailboxes import run_readers

ABLE = [[7, 1, 1, 1], [7, 2, 1, 1]]  # host, GPU, symmetric memory, reaches its peers


def test_ranks_of_one_host_with_a_gpu_each_read():
    assert decided(ABLE) == Transport("one_sided")


@pytest.mark.parametrize(
    ("rank", "fact", "value", "why"),
    [
        (1, 0, 8, "its ranks are on 2 hosts"),
        (1, 1, 1, "some of its ranks share a GPU"),
        (0, 2, 0, "torch has no symmetric memory on some rank"),
        (1, 3, 0, "some of its GPUs cannot reach each other's memory"),
    ],
)
def test_others_send_and_say_why(rank, fact, value, why):
    facts = [list(row) for row in ABLE]
    facts[rank][fact] = value
    assert str(decided(facts)) == f"all_to_all, as {why}"


@pytest.mark.parametrize("refused", [False, True])
def test_ranks_whose_torch_shares_no_memory_send(monkeypatch, refused):
    """As where each rank sees its own GPU alone, and nobody told torch that this is meant."""

    def shared_memory(*_):
        if refused:
            raise RuntimeError("rendezvous: detected allocations from overlapping devices from different ranks.")

    monkeypatch.setattr(choice, "shared_memory", shared_memory)
    monkeypatch.setattr(choice, "gather_facts", lambda _, facts, device: ABLE if len(facts) > 1 else [facts, facts])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    monkeypatch.setattr(choice, "_sees_peers", lambda _: True)
    found = choice._find(None, torch.device("cuda", 0))
    assert found.name == ("all_to_all" if refused else "one_sided")
    assert ("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1" in found.why) == refused


def test_ranks_on_cpus_send():
    found = transport_of(None, FetchOptions(), torch.device("cpu"))
    assert str(found) == "all_to_all, as ranks are on CPUs"


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"transport='one_sided' was given, but ranks are on CPUs: .* take transport='auto'"
    ):
        transport_of(None, FetchOptions(transport="one_sided"), torch.device("cpu"))
    with pytest.raises(ValueError, match="transport='nvlink' must be one of auto, one_sided, all_to_all"):
        FetchOptions(transport="nvlink")


def test_a_lone_rank_and_a_comm_of_another_class_stay_what_they_are():
    class Own(Comm):
        size = 2

    q = torch.zeros(4, 2, 8)
    for comm in (Comm(), Own()):
        assert with_transport(comm, FetchOptions(transport="one_sided"), q) is comm


@pytest.mark.parametrize("in_line", [True, False], ids=["in line", "overlapped"])
def test_bytes_that_are_read_are_those_of_the_formulas(in_line):
    lengths, size = [40, 24], 3
    inputs, plan = make_inputs(sum(lengths), 4, 2, 12, 8), make_plan("zigzag", lengths, size, SMALL)

    def work(comm):
        comm = replace(comm, most_in_line=10**9 if in_line else 0)
        traffic = Traffic()
        _, ids, *_ = run(inputs, SMALL, lengths, plan, comm.rank, comm, traffic=traffic)
        return ids, dict(traffic.sent_bytes), traffic.union_fractions

    found = run_readers(size, work)
    pages = cost.pages_of(plan, [ids for ids, *_ in found])
    heads = HeadSizes(4, 2, 12, 8, element_bytes=8)
    told = cost.sent_bytes(plan, SMALL, heads, pages, refetch=True, one_sided=True)
    assert [sent for _, sent, _ in found] == told
    num_remote = plan.num_blocks - plan.tokens_per_rank // plan.block_len
    for rank, (_, _, unions) in enumerate(found):
        assert sum(unions[0]) * num_remote == pytest.approx(sum(pages[rank]))


def test_boxes_grow_on_all_ranks_and_keep_the_old_ones():
    def work(comm):
        boxes = comm.boxes
        small = boxes.of("pages", 100)
        assert boxes.of("pages", 90) is small
        assert boxes.of("halo", 90) is not small
        before = boxes.generation
        large = boxes.of("pages", 5000)
        assert (boxes.generation, large.slot_bytes) == (before + 1, 5120)
        return boxes.num_bytes

    held = run_readers(2, work)
    assert held[0] == held[1] == sum(1024 + 2 * slot for slot in (256, 256, 5120))


def test_what_one_rank_puts_twice_is_taken_twice():
    """Two slots in turn: a rank that is an exchange behind still finds what was put for it."""

    def work(comm):
        found = []
        for number in range(5):
            found.append(comm.all_gather(torch.full((3,), 10.0 * comm.rank + number), "compressed")[:, 0].tolist())
        return found

    expected = [[float(number), 10.0 + number] for number in range(5)]
    assert run_readers(2, work) == [expected, expected]


def test_an_all_to_all_without_its_room_is_refused():
    def work(comm):
        with pytest.raises(ValueError, match="most_sent"):
            comm.all_to_all(torch.zeros(2, 3), [1, 1], [1, 1], "halo")
        return True

    assert run_readers(2, work) == [True, True]


@pytest.mark.parametrize("missing", [None, 3])
def test_an_exception_says_who_was_missing(monkeypatch, missing):
    class Boxes:
        def missing(self):
            return missing

    monkeypatch.setattr(mailboxes, "_OF_GROUPS", {"group": {"device": Boxes()}})
    named = (
        nullcontext() if missing is None else pytest.raises(RuntimeError, match="rank 3 did not come to an exchange")
    )
    with named, pytest.raises(KeyError) if missing is None else nullcontext(), naming_the_missing():
        raise KeyError("what CUDA said")
