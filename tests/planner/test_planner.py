"""The planner against sums of its own parts, and against arithmetic by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from nsa_dist.cp.options import FetchOptions
from nsa_dist.planner import memory
from nsa_dist.planner.cluster import Achieved
from nsa_dist.planner.core.strategies import GIB, Options
from nsa_dist.planner.fetching import fetching, markdown
from nsa_dist.planner.knobs import turn_knobs
from nsa_dist.planner.report import as_data
from nsa_dist.planner.shape import Shape
from nsa_dist.planner.sweep import make_plan
from nsa_dist.planner.verdict import break_even, verdict
from nsa_dist.train.config import ModelSection, ParallelSection, RunSection, TrainConfig
from planner_cases import cluster, long_config, long_plan

ROOT = Path(__file__).parents[2]


# --- Properties -----------------------------------------------------------------------------------------------------


def test_memory_falls_as_the_group_grows():
    totals = [c.judged.total_bytes for c in long_plan().candidates]
    assert [c.cp_size for c in long_plan().candidates] == [1, 2, 4, 8]
    assert totals == sorted(totals, reverse=True)
    for kind in ("weights", "optimizer", "gradients"):
        assert len({c.judged.memory_bytes[kind] for c in long_plan().candidates}) == 1


def test_only_eight_gpus_hold_a_million_tokens():
    assert [c.fits(cluster()) for c in long_plan().candidates] == [False, False, False, True]
    assert long_plan().best.cp_size == 8
    assert long_plan().best.layout == "zigzag"


def test_sums_add_up():
    for candidate in as_data(long_plan())["candidates"]:
        for row in candidate["strategies"]:
            assert sum(row["memory_bytes"].values()) == row["total_memory_bytes"]
            assert sum(row["compute_s"].values()) + sum(row["wire_s"].values()) == pytest.approx(row["step_s"])
            assert set(row["memory_bytes"]) == set(memory.KINDS)


def test_the_alternatives_send_the_whole_sequence():
    """S forward and 3 S backward of what other ranks hold; the recomputed forward is one more S."""
    candidate = long_plan().candidates[-1]
    whole = 2**20 * 4 * 256 * 2 * 7 // 8 * 4  # bf16 K and V of 4 heads on 7 of 8 ranks, 4 layers
    for how in ("all-gather", "ring", "whole shard"):
        sent = candidate.outcome(how).sent_bytes
        assert sent["pages"] == 3 * whole
        assert sent["pages.grad"] == 2 * whole
        assert sent["bitmap"] == 0


def test_raw_gathering_moves_three_branches_and_compresses_everything():
    candidate = long_plan().candidates[-1]
    raw, gather = candidate.outcome("raw all-gather"), candidate.outcome("all-gather")
    assert raw.sent_bytes["pages"] == 3 * gather.sent_bytes["pages"]
    assert raw.sent_bytes["pages.grad"] == 3 * gather.sent_bytes["pages.grad"]
    assert not any(raw.sent_bytes[kind] for kind in ("halo", "compressed", "bitmap", "halo.grad", "compressed.grad"))
    # Two forwards and a backward over an eighth; backward compresses once more.
    attention = cluster().attention.phi
    one = gather.time.compute_s["phi"]
    forward, backward = 2 / attention.forward.value, 2 / attention.backward.value
    more = 1 / attention.forward.value
    expected = 8 * one * (forward + backward + more) / (forward + backward)
    assert raw.time.compute_s["phi"] == pytest.approx(expected, rel=1e-3)


def test_one_shared_pair_gathered_by_heads():
    """A third of what three pairs send, for another model; of a million tokens one head is 0.5 GiB, its sums 1 GiB."""
    candidate = long_plan().candidates[-1]
    raw, shared = candidate.outcome("raw all-gather"), candidate.outcome("shared all-gather")
    fetched = candidate.judged
    for kind in ("pages", "pages.grad"):
        assert 3 * shared.sent_bytes[kind] == raw.sent_bytes[kind]
    assert sum(shared.sent_bytes.values()) == shared.sent_bytes["pages"] + shared.sent_bytes["pages.grad"]
    assert shared.held_bytes == 2**20 * (128 + 128) * (2 + 4) == 1.5 * GIB
    assert {c.outcome("shared all-gather").held_bytes for c in long_plan().candidates[1:]} == {1.5 * GIB}  # at any P
    assert fetched.held_bytes == 3.9375 * GIB  # at u = 1
    assert shared.time.compute_s["phi"] == raw.time.compute_s["phi"]
    model = candidate.shape.with_shared_kv()
    assert model.config.nsa.shared_kv
    assert shared.memory_bytes["weights"] == 2 * model.stage_parameters(0) < fetched.memory_bytes["weights"]
    # Smaller by two pairs as projected, in each of four layers.
    pair = candidate.shape.tokens * 4 * (128 + 128) * 2
    assert fetched.memory_bytes["kv"] - shared.memory_bytes["kv"] == 4 * 2 * pair


def check_the_docs_table(sizes: list[int]) -> None:
    """Each rank for itself, and in domains of a node; the table goes on with more GPUs."""
    text, nodes = (ROOT / "docs/explained/fetching.md").read_text(), cluster().model_copy(update={"num_nodes": 64})
    for domain_size in (None, 8):
        options = Options(fetch=FetchOptions(domain_size=domain_size))
        assert markdown(make_plan(long_config(), nodes, options, sizes)) in text


def test_the_docs_have_the_planners_table():
    check_the_docs_table([8, 16, 32])


@pytest.mark.slow
def test_the_docs_have_the_planners_table_up_to_512_gpus():
    check_the_docs_table([8, 16, 32, 64, 128, 256, 512])


def test_fetching_pays_below_break_even():
    sent = Options(fetch=FetchOptions(transport="all_to_all"))
    (row,), (read,) = (fetching(make_plan(long_config(), cluster(), options, [1, 8])) for options in (sent, Options()))
    assert row.cp_size == 8
    assert 0 < row.even_gather < row.even_raw <= 1
    assert row.saved[0.05] > row.saved[0.2] > row.saved[1.0] > 0
    assert row.held_bytes[0.05] < row.held_bytes[0.2] < row.held_bytes[1.0] < row.raw_held_bytes
    assert set(read.held_bytes.values()) == {row.held_bytes[1.0]}  # where ranks read, every remote block has its place


def test_ranks_that_read_memory_have_mailboxes():
    """About 0.9 GiB of a million tokens over 8; none where they send, gather, or span nodes."""
    config, options = long_config(), Options(fetch=FetchOptions(transport="all_to_all"))
    read = make_plan(config, cluster(), cp_sizes=[1, 8])
    alone, several = (candidate.judged.memory_bytes["mailboxes"] for candidate in read.candidates)
    assert (alone, several / GIB) == (0, pytest.approx(0.9, abs=0.05))
    assert read.candidates[1].outcome("raw all-gather").memory_bytes["mailboxes"] == 0
    assert make_plan(config, cluster(), options, [8]).best.judged.memory_bytes["mailboxes"] == 0
    nodes = cluster().model_copy(update={"num_nodes": 2})
    assert make_plan(config, nodes, cp_sizes=[16]).candidates[0].judged.memory_bytes["mailboxes"] == 0


def test_fewer_chosen_blocks_cost_less():
    outcomes = [o for o in long_plan().best.outcomes if o.strategy.how == "fetch"]
    assert [o.strategy.union_fraction for o in outcomes] == [1.0, 0.2, 0.05]
    for figure in (lambda o: o.time.total_s, lambda o: o.total_bytes, lambda o: o.sent_bytes["pages"]):
        values = [figure(o) for o in outcomes]
        assert values == sorted(values, reverse=True)


def test_kept_pages_are_sent_once_and_held_longer():
    kept = make_plan(long_config(), cluster(), Options(fetch=FetchOptions(keep_pages=True)), [8]).best.judged
    again = long_plan().best.judged
    assert again.sent_bytes["pages"] * 2 == kept.sent_bytes["pages"] * 3  # forward, recomputed forward, backward
    assert kept.memory_bytes["pages"] > again.memory_bytes["pages"]


def test_a_page_budget_bounds_pages_and_costs_rounds():
    plan = make_plan(long_config(), cluster(), Options(fetch=FetchOptions(kv_fetch_budget_bytes=GIB // 2)), [8])
    judged, free = plan.best.judged, long_plan().best.judged
    # Three rounds of half the budget: in use, on their way, packed for others; and gradients twice as wide as often.
    assert judged.memory_bytes["pages"] == 3 * GIB // 4 * 3
    assert free.time.compute_s["merge"] == 0 < judged.time.compute_s["merge"]


def test_overlap_hides_the_wire_and_nothing_else():
    hidden = make_plan(long_config(), cluster(), Options(overlap=1.0), [8]).best.judged.time
    assert sum(hidden.wire_s.values()) == 0
    assert hidden.compute_s == long_plan().best.judged.time.compute_s


def test_break_even_separates_quicker_from_slower():
    plan, best = long_plan(), long_plan().best
    even = break_even(plan, best, "all-gather")
    assert 0 < even < 1
    beside = make_plan(long_config(), cluster(), Options(union_fractions=(even - 0.05, even + 0.05)), [8]).best
    lower, higher = (o.time.total_s for o in beside.outcomes[:2])
    assert lower < best.outcome("all-gather").time.total_s < higher


def test_fetching_pays_less_between_nodes():
    """A page crosses to a node as often as its ranks want it; an all-gathered shard crosses once."""
    several = cluster().model_copy(update={"num_nodes": 4})
    plan = make_plan(long_config(), several, cp_sizes=[8, 32])
    inside, across = (break_even(plan, candidate, "all-gather") for candidate in plan.candidates)
    assert across < inside


def test_replicas_take_what_the_batch_feeds():
    run = RunSection(output_dir="unused", sequence_length=2**14, dtype="bf16", global_batch_size=2)
    plan = make_plan(long_config(run=run), cluster(), cp_sizes=[1, 2, 4, 8])
    assert [c.replicas for c in plan.candidates] == [2, 2, 2, 1]
    assert [c.idle_gpus for c in plan.candidates] == [6, 4, 0, 0]
    assert [c.micro_batches for c in plan.candidates] == [1, 1, 1, 2]


def test_parallel_sizes_divide_a_rank_of_the_model():
    whole = Shape.of(long_config(), 2, "zigzag")
    cut = Shape.of(
        long_config(
            parallel=ParallelSection(
                tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
            )
        ),
        2,
        "zigzag",
    )
    assert cut.stage_multiplications(1) * 4 == whole.stage_multiplications(0)
    assert cut.phi_parameters * 2 == whole.phi_parameters
    assert cut.most_layers * 2 == whole.most_layers
    assert memory.stage_activation_bytes(cut, 1) * 4 == memory.stage_activation_bytes(whole, 0)
    both_stages = sum(cut.stage_parameters(stage) for stage in range(2))
    norms = 2048 * (2 * 4 + 1)  # whole on every tensor-parallel rank
    assert (both_stages - norms) * 2 + norms == whole.stage_parameters(0)


def test_experts_are_planned_with_what_they_hold_and_what_a_token_takes():
    model = long_config().model.model_dump() | {"num_experts": 16, "moe_ffn_hidden_size": 1408, "moe_router_topk": 4}
    given = {"model": ModelSection(**model), "run": long_config().run.model_copy(update={"sequence_length": 2**16})}
    config, alike = long_config(**given), long_config(run=given["run"])
    cut = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    one, two = (
        Shape.of(long_config(**given, **more), 2, "zigzag") for more in ({}, {"parallel": ParallelSection(**cut)})
    )
    router, expert = 2048 * 16, 3 * 2048 * 1408
    assert [mlp.parameters for mlp in one.mlps(0)] == 4 * [16 * expert + router]
    assert [mlp.parameters for mlp in two.mlps(0)] == 4 * [16 * expert // 2 + router]
    assert [mlp.active_parameters for mlp in one.mlps(0)] == 4 * [4 * expert + router]
    # Four experts of a token are as wide as the MLP of the other model, and take as long but for the router.
    plan, other = make_plan(config, cluster(), cp_sizes=[2]), make_plan(alike, cluster(), cp_sizes=[2])
    dense, expected = (each.candidates[0].judged.time.compute_s["dense"] for each in (plan, other))
    assert expected < dense < 1.01 * expected
    more = plan.candidates[0].judged.memory_bytes["weights"] - other.candidates[0].judged.memory_bytes["weights"]
    assert more == 2 * 4 * (12 * expert + router)
    words = "\n".join(verdict(plan))
    assert "Experts: 4 of 4 layers, 16 each, all on every rank" in words
    assert "0.55B parameters, 0.14B of them for a token" in words
    assert "Experts" not in "\n".join(verdict(other))


# --- Words and errors -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_told_with_a_knob_that_helps():
    model = long_config().model.model_copy(update={"num_layers": 12})
    plan = make_plan(long_config(model=model), cluster())
    words = "\n".join(verdict(plan))
    assert plan.best is None
    assert "Nothing fits" in words
    assert "run.sequence_length=524288 fits" in words
    knobs = turn_knobs(plan)
    assert [k.fits for k in knobs] == sorted((k.fits for k in knobs), reverse=True)


def test_verdict_says_when_fetching_pays():
    words = "\n".join(verdict(long_plan()))
    assert "Take cp 8" in words
    assert "only while u < 0." in words
    assert "At fetch u=0.05 it saves 167.3 ms a step (2.1%)." in words
    # Where collectives reach three quarters of the datasheet's rate, less than 2% of a step is at stake.
    link = cluster().intra_node.model_copy(update={"achieved": Achieved()})
    words = "\n".join(verdict(make_plan(long_config(), cluster().model_copy(update={"intra_node": link}))))
    assert "Fetch for the memory bound, not for speed." in words


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [((3,), "take a size that divides them"), ((16,), "describe a larger cluster with --cluster")],
)
def test_sizes_that_do_not_fit_the_cluster(sizes, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_plan(long_config(), cluster(), cp_sizes=sizes)


def test_lengths_that_do_not_divide():
    run = RunSection(output_dir="unused", sequence_length=256)
    with pytest.raises(ValueError, match="take sequence_length=512"):
        make_plan(TrainConfig(run=run), cluster(), cp_sizes=[4])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"union_fractions": (2.0,)}, "pass for example --u"),
        ({"union_fractions": ()}, "pass for example --u"),
        ({"overlap": -1.0}, "pass 0 for what is certain"),
    ],
)
def test_options_that_make_no_sense(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        replace(Options(), **options)
