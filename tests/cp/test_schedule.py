"""The order of what is posted, computed and waited for, from the trace of every rank; and what is held meanwhile."""

import weakref
from dataclasses import dataclass, field
from functools import cache

import pytest

from cases import SMALL, make_inputs, run
from cp_cases import make_plan
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.trace import Trace
from thread_ranks import ThreadComm, run_threads

SIZE, NUM_KV_HEADS, NUM_TOKENS = 3, 4, 480
PAGE_BYTES = SMALL.slc_block_len * (8 + 8) * 8


@cache
def traces(num_kv_heads: int = NUM_KV_HEADS, layout: str = "zigzag", options: FetchOptions | None = None):
    """(trace, kinds in the order they were posted) of every rank, of one forward and backward."""
    inputs = make_inputs(NUM_TOKENS, num_kv_heads, num_kv_heads)

    def work(comm: ThreadComm):
        trace = Trace()
        plan = make_plan(layout, [NUM_TOKENS], SIZE, SMALL)
        run(inputs, SMALL, [NUM_TOKENS], plan, comm.rank, comm, fetch=options, trace=trace)
        return trace, comm.board.order[comm.rank]

    return run_threads(SIZE, work)


class Order:
    """Where events stand in a trace: `at("post", "pages[0]")`."""

    def __init__(self, trace: Trace, phase: str):
        self.events = [(event.action, event.name) for event in trace.events if event.phase == phase]

    def at(self, action: str, name: str) -> int:
        assert self.events.count((action, name)) == 1, f"{action} {name} in {self.events}"
        return self.events.index((action, name))

    def holds(self, *steps: tuple[str, str]) -> None:
        """Assert that the steps come in this order."""
        places = [self.at(*step) for step in steps]
        assert places == sorted(places), f"{steps} come in another order: {self.events}"


def each_rank(phase: str, **kwargs) -> list[Order]:
    return [Order(trace, phase) for trace, _ in traces(**kwargs)]


# --- Forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_halo_and_compressed_keys_travel_under_the_window(layout):
    for order in each_rank("forward", layout=layout):
        order.holds(
            ("post", "halo"),
            ("begin", "win[interior]"),
            ("end", "win[interior]"),
            ("wait", "halo"),
            ("begin", "phi"),
            ("post", "compressed"),
        )
        rest = [name for action, name in order.events if action == "begin" and name.startswith("win[") and ":" in name]
        assert rest
        for name in rest:
            order.holds(("post", "compressed"), ("begin", name), ("end", name), ("wait", "compressed"))
        order.holds(("done", "compressed"), ("begin", "cmp[0]"))


def test_bits_come_to_the_host_when_the_next_stage_is_queued():
    last = NUM_KV_HEADS - 1
    for order in each_rank("forward"):
        for h in range(last):
            order.holds(("post", f"bitmap[{h}]"), ("begin", f"cmp[{h + 1}]"), ("end", f"select[{h + 1}]"))
            order.holds(("end", f"select[{h + 1}]"), ("wait", f"bitmap[{h}]"), ("post", f"pages[{h}]"))
            # Collectives run as they are posted: behind this bitmap, pages would wait for the selection that it tells.
            order.holds(("post", f"pages[{h}]"), ("post", f"bitmap[{h + 1}]"))
        order.holds(("post", f"bitmap[{last}]"), ("end", f"slc[{last - 1}]"), ("wait", f"bitmap[{last}]"))


def test_pages_travel_under_compressed_attention_and_selection():
    for order in each_rank("forward"):
        for h in range(NUM_KV_HEADS - 2):
            order.holds(
                ("post", f"pages[{h}]"),
                ("begin", f"cmp[{h + 2}]"),
                ("end", f"select[{h + 2}]"),
                ("wait", f"pages[{h}]"),
                ("begin", f"slc[{h}]"),
            )


def test_no_more_than_two_stages_of_pages_are_held():
    for order in each_rank("forward"):
        for h in range(NUM_KV_HEADS - 2):
            order.holds(("end", f"slc[{h}]"), ("post", f"pages[{h + 2}]"))


def test_one_kv_head_goes_in_halves_of_the_queries():
    for order in each_rank("forward", num_kv_heads=1):
        order.holds(("begin", "cmp[0]"), ("post", "bitmap[0]"), ("begin", "cmp[1]"), ("end", "select[1]"))
        order.holds(("end", "select[1]"), ("post", "pages[0]"), ("post", "bitmap[1]"), ("begin", "slc[0]"))
        order.holds(("end", "slc[0]"), ("post", "pages[1]"), ("begin", "slc[1]"))


# --- Backward ---------------------------------------------------------------------------------------------------


def test_backward_fetches_under_the_group_before():
    for order in each_rank("backward"):
        order.holds(("post", "pages[0]"), ("begin", "delta[0]"), ("end", "cmp[0]"), ("wait", "pages[0]"))
        for h in range(NUM_KV_HEADS - 1):
            order.holds(
                ("post", f"pages[{h + 1}]"),
                ("begin", f"slc[{h}]"),
                ("end", f"win[{h}]"),
                ("end", f"cmp[{h + 1}]"),
                ("wait", f"pages[{h + 1}]"),
            )
        for h in range(NUM_KV_HEADS - 2):
            order.holds(("end", f"slc[{h}]"), ("post", f"pages[{h + 2}]"))


def test_gradients_go_home_under_the_group_after():
    last = NUM_KV_HEADS - 1
    for order in each_rank("backward"):
        for h in range(last):
            order.holds(
                ("end", f"slc[{h}]"),
                ("post", f"pages.grad[{h}]"),
                ("begin", f"win[{h}]"),
                ("end", f"slc[{h + 1}]"),
                ("wait", f"pages.grad[{h}]"),
            )
        order.holds(("post", f"pages.grad[{last}]"), ("begin", f"win[{last}]"), ("wait", f"pages.grad[{last}]"))
        for h in range(NUM_KV_HEADS):
            order.holds(
                ("end", f"cmp[{h}]"),
                ("post", f"compressed.grad[{h}]"),
                ("begin", f"slc[{h}]"),
                ("end", f"win[{last}]"),
                ("wait", f"compressed.grad[{h}]"),
            )


def test_backward_tells_nobody_what_was_chosen():
    for order in each_rank("backward"):
        assert not [name for _, name in order.events if name.startswith("bitmap")]


# --- Both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 1, 2 * PAGE_BYTES, 7 * PAGE_BYTES])
@pytest.mark.parametrize("num_kv_heads", [1, NUM_KV_HEADS])
def test_every_rank_posts_the_same_collectives(num_kv_heads, budget):
    found = traces(num_kv_heads=num_kv_heads, options=FetchOptions(kv_fetch_budget_bytes=budget))
    assert len({tuple(order) for _, order in found}) == 1


def test_what_is_posted_is_waited_for():
    for trace, _ in traces():
        spans = trace.spans()
        posted = [event for event in trace.events if event.action == "post"]
        assert len([span for span in spans if span.what == "transfer"]) == len(posted)
        assert len([span for span in spans if span.what == "wait"]) == len(posted)


@dataclass(frozen=True)
class Watched(ThreadComm):
    """Counts the bytes of fetched pages that are alive, `now`, and the `most` there ever were."""

    alive: dict[str, int] = field(default_factory=lambda: {"now": 0, "most": 0})

    def _start_all_to_all(self, out, x, recv_sizes, send_sizes, kind):
        super()._start_all_to_all(out, x, recv_sizes, send_sizes, kind)
        if kind not in ("pages", "pages.inside"):
            return
        num_bytes = out.nbytes
        alive = self.alive
        alive["now"] += num_bytes
        alive["most"] = max(alive.values())
        weakref.finalize(out.untyped_storage(), lambda: alive.update(now=alive["now"] - num_bytes))


@pytest.mark.parametrize("num_pages", [1, 2, 3, 6, 40])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_pages_held_at_once_fit_in_the_budget(num_kv_heads, num_pages):
    inputs = make_inputs(NUM_TOKENS, num_kv_heads, num_kv_heads)
    options = FetchOptions(kv_fetch_budget_bytes=num_pages * PAGE_BYTES)

    def work(comm: ThreadComm):
        watched = Watched(board=comm.board, index=comm.index)
        plan = make_plan("zigzag", [NUM_TOKENS], SIZE, SMALL)
        run(inputs, SMALL, [NUM_TOKENS], plan, comm.rank, watched, fetch=options)
        return watched.alive

    for alive in run_threads(SIZE, work):
        assert alive["now"] == 0
        assert 0 < alive["most"] <= num_pages * PAGE_BYTES


def test_saved_outputs_are_freed_before_the_branches_run_backward(monkeypatch):
    """Of the three outputs of the branches nothing is left when the first branch's backward begins."""
    from nsa_kernels import reference

    outs: list[weakref.ref] = []
    combine, backward = reference.combine, reference.compressed_attention_backward
    seen = []

    def watch(gates, *branches, out=None):
        outs.extend(weakref.ref(x.untyped_storage()) for x in branches)
        return combine(gates, *branches, out=out)

    def check(*args, **kwargs):
        seen.append(sum(ref() is not None for ref in outs))
        return backward(*args, **kwargs)

    monkeypatch.setattr(reference, "combine", watch)
    monkeypatch.setattr(reference, "compressed_attention_backward", check)
    run(make_inputs(100), SMALL, [100])
    assert len(outs) == 3
    assert seen == [0]
