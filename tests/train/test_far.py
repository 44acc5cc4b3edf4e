"""Losses by place in a document, and of its end with what is far scrambled: of what they say, over ranks the same."""

import pytest
import torch

from nsa_dist.train.data.far import FarContext
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.step import _loss_by_place, _places
from ranks import run_ranks
from train_cases import KEPT, evaluates_far_context, records, small_config, write_texts


class Drawn:
    """One sample of three documents, of 100, 30 and 70 tokens, all of them different."""

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        text = torch.arange(201) + 1000 * n
        mask = torch.ones(200)
        mask[[99, 129]] = 0
        return {
            "tokens": text[:-1], "labels": text[1:], "loss_mask": mask, "position_ids": torch.arange(200),
            "cu_seqlens": torch.tensor([0, 100, 130, 200]),
        }  # fmt: skip


@pytest.mark.parametrize("scrambled", [False, True])
def test_the_ends_of_long_documents_are_judged_and_what_is_far_is_scrambled(scrambled):
    plain, found = Drawn()[3], FarContext(Drawn(), 20, scrambled)[3]
    assert found["loss_mask"].nonzero().flatten().tolist() == [*range(80, 99), *range(180, 200)]
    assert all(torch.equal(found[name], plain[name]) for name in ("position_ids", "cu_seqlens"))
    assert torch.equal(found["labels"][:-1], found["tokens"][1:])
    moved = (found["tokens"] != plain["tokens"]).nonzero().flatten().tolist()
    for far in (range(60), range(130, 160)):
        assert sorted(found["tokens"][far].tolist()) == plain["tokens"][far].tolist()
        assert len(set(far).intersection(moved)) >= len(far) // 2 * scrambled
    assert set(moved) <= {*range(60), *range(130, 160)} if scrambled else not moved
    again = FarContext(Drawn(), 20, scrambled)[3]
    assert all(torch.equal(found[name], again[name]) for name in (*Samples.names, "cu_seqlens"))


def test_places_share_out_the_whole_loss():
    places, position = _places(300), torch.tensor([[0, 63, 64, 255, 256, 299, 7, 130]])
    assert places == [64, 128, 256, 512]
    losses, mask = torch.arange(1.0, 9.0)[None], torch.tensor([[1, 1, 1, 0, 2, 1, 1, 1]])
    loss, number, report = _loss_by_place(mask, position, places, losses)
    assert (loss, number) == (1 + 2 + 3 + 10 + 6 + 7 + 8, 8)
    assert report["loss"].tolist() == [37, 1 + 2 + 7, 3, 8, 16, 8, 3, 1, 1, 3]


LAYOUTS = {"CP2": {"context_parallel_size": 2}, "TP2": {"tensor_model_parallel_size": 2}}


@pytest.mark.parametrize("documents", ["whole", "packed"])
def test_two_ranks_say_what_one_says(tmp_path, documents):
    write_texts(tmp_path / "texts")
    run_ranks(1, evaluates_far_context, tmp_path, "one", documents, {})
    for name, parallel in LAYOUTS.items():
        run_ranks(2, evaluates_far_context, tmp_path, name, documents, parallel)
        for which, names in (("validation", ("loss",)), ("far_context", ("loss", "loss_scrambled", "tokens"))):
            one, two = (records(tmp_path, folder, which) for folder in ("one", name))
            assert [r["step"] for r in one] == [r["step"] for r in two] == [0, 2]
            for a, b in zip(one, two, strict=True):
                assert [b[number] for number in names] == pytest.approx([a[number] for number in names], rel=1e-6)
                assert b.get("by_position", {}) == pytest.approx(a.get("by_position", {}), rel=1e-6)
    validation, far = (records(tmp_path, "one", which)[-1] for which in ("validation", "far_context"))
    assert validation["by_position"].keys() == {"64", "128", "256"}
    if documents == "whole":  # every place has as many tokens as it is long
        assert validation["loss"] == pytest.approx(
            sum(validation["by_position"][str(end)] * share for end, share in ((64, 0.25), (128, 0.25), (256, 0.5)))
        )
    assert far["kept"] == KEPT
    assert far["tokens"] % KEPT in (0, KEPT - 1)
    assert far["tokens"] > 0
    assert far["loss"] != far["loss_scrambled"]


def test_samples_without_room_for_it_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eval_far_context=86 with sequence_length=256.*take 85 at most"):
        small_config(tmp_path, "few", run={"output_dir": tmp_path, "sequence_length": 256, "eval_far_context": 86})
