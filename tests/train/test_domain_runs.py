"""A run over four context-parallel ranks in two domains: it trains as without them, and counts what crosses."""

import pytest

from nsa_dist.train.identity import FIXED, FREE
from ranks import run_ranks
from train_cases import StopAfter, records, run, small_config, write_texts

RUNS = {
    "each for itself": {},
    "domains": {"domain_size": 2},
    "domains, recomputed": {"domain_size": 2},
    "domains, pages kept": {"domain_size": 2, "keep_pages": True, "kv_fetch_budget_bytes": 8192},
}


def runs(rank: int, base) -> None:
    for name, options in RUNS.items():
        model = {"recompute_attention": name.endswith("recomputed")}
        config = small_config(base, name, parallel={"context_parallel_size": 4, **options}, model=model)
        run(config, StopAfter(2))


@pytest.mark.slow
def test_four_ranks_in_two_domains_train_as_each_for_itself(tmp_path):
    write_texts(tmp_path / "texts")
    run_ranks(4, runs, tmp_path)
    losses = {name: [r["loss"] for r in records(tmp_path, name)] for name in RUNS}
    for name in RUNS:
        assert losses[name] == pytest.approx(losses["each for itself"], rel=1e-6)
        for record in records(tmp_path, name, "traffic"):
            assert record["sent_bytes"] == record["formula_bytes"]
    alone, domains = (records(tmp_path, name, "traffic")[-1]["sent_bytes"] for name in list(RUNS)[:2])
    assert 0 < domains["pages"] < alone["pages"]
    assert domains["pages.inside"] > 0
    start = records(tmp_path, "domains", "start")[0]
    assert start["domain_size"] == 2
    assert start["transport"] == "all_to_all, as a page is to enter each domain of 2 ranks once"


def test_a_run_may_go_on_with_other_domains():
    assert "parallel.domain_size" in FREE
    assert "parallel.domain_size" not in FIXED
