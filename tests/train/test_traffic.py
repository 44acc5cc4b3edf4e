"""Which entries of the table a rank fills in, and what the sum of the tables says. No process group."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa_dist.cp.comm import Traffic
from nsa_dist.train import traffic as module
from nsa_dist.train.data.batches import sequence_plan
from nsa_dist.train.traffic import TrafficMeter
from train_cases import small_config

KINDS = ("halo", "halo.grad", "compressed", "compressed.grad", "bitmap", "pages", "pages.grad")


def make_meter(tmp_path, **parallel) -> TrafficMeter:
    config = small_config(tmp_path, "x", parallel={"context_parallel_size": 2, **parallel}, model={"num_layers": 2})
    return TrafficMeter(config, sequence_plan(config))


def stage(layer_number: int, tp_rank: int) -> SimpleNamespace:
    """A pipeline stage of one layer."""
    attention = SimpleNamespace(layer_number=layer_number, pg_collection=SimpleNamespace(tp=tp_rank))
    return SimpleNamespace(attentions={layer_number - 1: attention})


@pytest.fixture(autouse=True)
def groups_are_ranks(monkeypatch):
    monkeypatch.setattr(module, "get_pg_rank", lambda group: group)


def test_stages_fill_their_layers_and_tensor_ranks_their_heads(tmp_path):
    meter = make_meter(tmp_path, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    total = torch.zeros(2, 2 * len(KINDS) + 2 + 3, dtype=torch.float64)
    for layer in (0, 1):
        for head in (0, 1):
            for cp_rank in (0, 1):
                counted = Traffic()
                counted.add("pages", 0 if cp_rank else 100 * (layer + 1))
                counted.add("layout", 16)
                for _ in range(2):  # calls of 2 sequences, each with 16 remote blocks
                    counted.count_union(torch.tensor([0 if cp_rank else 2 * (1 + layer + 2 * head)]), 16)
                total += meter.pack(stage(layer + 1, head), {layer: counted}).view_as(total)
    record = meter.record(7, total.flatten().tolist())
    assert record["step"] == 7
    assert [layer["sent_bytes"]["pages"] for layer in record["layers"].values()] == [200, 400]
    assert record["sent_bytes"] == {**dict.fromkeys(KINDS, 0), "pages": 600}
    # The second context-parallel rank chose nothing: the mean is half of the first one's.
    assert [layer["union_fraction"] for layer in record["layers"].values()] == [[1 / 16, 3 / 16], [2 / 16, 4 / 16]]
    assert record["union_fraction"] == pytest.approx(10 / 64)


def test_union_fractions_are_counts_again(tmp_path):
    """They are fractions in fp32; the number of pages must be whole."""
    meter, counted = make_meter(tmp_path), Traffic()
    for chosen in ([3, 7], [1, 2]):
        counted.count_union(torch.tensor(chosen), 16)
    table = meter.pack(stage(1, 0), {0: counted}).view(2, -1)
    assert table[0, 2 * len(KINDS) : -3].tolist() == [4, 9]
    assert table[0, -3] == 32, "blocks that might have been"
    assert table[1].abs().sum() == 0


def test_a_kind_without_a_formula_is_not_lost_silently(tmp_path):
    counted = Traffic()
    counted.add("gossip", 1)
    counted.count_union(torch.zeros(2), 16)
    with pytest.raises(ValueError, match="gossip"):
        make_meter(tmp_path).pack(stage(1, 0), {0: counted})


def test_of_a_step_without_a_record_nothing_is_counted_or_worked_out(tmp_path, monkeypatch):
    meter = replace(make_meter(tmp_path), watched=False)
    monkeypatch.setattr(module.cost, "sent_bytes", None)
    batches = [SimpleNamespace(pack=None)] * 2
    assert list(meter.noting(iter(batches))) == batches
    with meter.counting(stage(1, 0)) as counted:
        assert counted == {}
    assert meter.pack(stage(1, 0), counted).numel() == 0


def test_a_group_of_one_has_no_table(tmp_path):
    config = small_config(tmp_path, "x")
    meter = TrafficMeter(config, sequence_plan(config))
    assert meter.pack(stage(1, 0), {}).numel() == 0
