"""Handles and the trace, on one process: what ranks do with them is in test_schedule.py."""

import pytest
import torch

from nsa_dist.cp.comm import Comm, Handle
from nsa_dist.cp.trace import Trace


class Echo(Comm):
    """Two ranks, the other of which sends what this one does."""

    size, rank = 2, 0  # type: ignore[assignment]

    def _start_all_gather(self, out, x, kind):
        out.copy_(x.expand_as(out))

    def _start_reduce_scatter(self, out, x, kind):
        out.copy_(2 * x[0])

    def _start_all_to_all(self, out, x, recv_sizes, send_sizes, kind):
        out.copy_(x)


def test_a_second_wait_raises():
    handle = Handle(torch.ones(2))
    assert handle.wait().eq(1).all()
    with pytest.raises(RuntimeError, match="keep the tensor that the first"):
        handle.wait()


def test_a_group_of_one_returns_its_input():
    comm, x = Comm(trace=Trace()), torch.arange(6.0).reshape(2, 3)
    assert torch.equal(comm.all_gather(x, "a"), x[None])
    assert torch.equal(comm.reduce_scatter(x[None], "a"), x)
    assert comm.all_to_all(x, [2], [2], "a") is x
    assert not comm.traffic.sent_bytes
    assert not comm.trace.events


def test_bytes_are_counted_where_they_are_posted():
    comm = Echo(trace=Trace())
    x = torch.zeros(4, 3)
    handles = [
        comm.post_all_gather(x, "compressed"),
        comm.post_reduce_scatter(x.reshape(2, 2, 3), "compressed.grad"),
        comm.post_all_to_all(x, [1, 3], [2, 2], "pages", "pages[0]"),
    ]
    assert comm.traffic.sent_bytes == {"compressed": 48, "compressed.grad": 24, "pages": 36}
    assert [h.wait().shape for h in handles] == [(2, 4, 3), (2, 3), (4, 3)]
    posted = [(e.name, e.num_bytes) for e in comm.trace.events if e.action == "post"]
    assert posted == [("compressed", 48), ("compressed.grad", 24), ("pages[0]", 36)]


def test_spans_pair_what_opens_with_what_closes():
    comm = Echo(trace=Trace())
    halo = comm.post_all_gather(torch.zeros(1), "halo")
    with comm.computing("win[0]", "win"):
        pass
    halo.wait()
    comm.enter("backward")
    with comm.computing("win[0]", "win"):
        pass
    assert [(e.action, e.name, e.phase) for e in comm.trace.events] == [
        ("post", "halo", "forward"),
        ("begin", "win[0]", "forward"),
        ("end", "win[0]", "forward"),
        ("wait", "halo", "forward"),
        ("done", "halo", "forward"),
        ("begin", "win[0]", "backward"),
        ("end", "win[0]", "backward"),
    ]
    spans = {span.what: span for span in comm.trace.spans() if span.phase == "forward"}
    assert spans["transfer"].begin_s < spans["compute"].begin_s < spans["compute"].end_s < spans["wait"].begin_s
