"""Runs on token sets: how sets are blended, what is refused before anything starts, and a run that goes on."""

import heapq
import json
import shutil
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nsa_dist.inference.generate import Sampling
from nsa_dist.planner.shape import Shape
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.blend import Blend
from nsa_dist.train.data.samples import Samples, split_documents
from nsa_dist.train.export.run import plain_model
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.prepare import prepare_output
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import DataSection
from nsa_dist.train.tokens import sets
from nsa_dist.train.tokens.listing import file_of
from nsa_launch.commands import generate
from nsa_launch.config import checked
from nsa_launch.yaml_values import read_word
from ranks import run_ranks
from token_cases import WEIGHTS, config_of, shifted_set, token_runs
from train_cases import records


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for i, name in enumerate(WEIGHTS):
            shifted_set(monkeypatch, folder / name, start=10 * i)
    return folder


@pytest.fixture
def base(tmp_path, built) -> Path:
    shutil.copytree(built, tmp_path / "sets")
    return tmp_path


# --- the order ------------------------------------------------------------------------------------------------------


def by_time(weights: list[float]):
    """The blend by its definition, one sample after the other."""
    following = [(Fraction(1, 2) / Fraction(str(weight)), i, 0) for i, weight in enumerate(weights)]
    heapq.heapify(following)
    while True:
        _, which, number = heapq.heappop(following)
        yield which, number
        heapq.heappush(following, ((number + Fraction(3, 2)) / Fraction(str(weights[which])), which, number + 1))


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 1, 3], [1e-3, 0.2, 3, 17.5, 0.4], [1e-9, 1e9]])
def test_any_sample_of_a_blend_is_found_without_those_before_it(weights):
    blend = Blend([None] * len(weights), weights)
    assert [blend.place(n) for n in range(600)] == list(islice(by_time(weights), 600))


def test_a_blend_keeps_to_its_weights_however_far_it_goes():
    blend = Blend([None] * 3, [0.5, 0.3, 0.2])
    assert Counter(blend.place(n)[0] for n in range(10**12, 10**12 + 1000)) == {0: 500, 1: 300, 2: 200}
    assert [blend.place(n) for n in range(5)] == [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2)]  # is in checkpoints


def test_documents_validate_or_train_and_samples_are_of_the_chosen(base):
    documents = IndexedDataset(str(base / "sets/a"))
    split = split_documents(len(documents), 0.25, "a")
    assert sorted([*split["train"], *split["validation"]]) == list(range(8))
    assert len(split["validation"]) == 2
    samples = Samples(documents, 64, seed=3, chosen=split["validation"])
    held = set(np.concatenate([documents[int(i)] for i in split["validation"]]).tolist())
    assert samples.num_tokens == sum(len(documents[int(i)]) for i in split["validation"])
    assert set(samples[0]["tokens"].tolist()) <= held
    assert {len(part) for part in split_documents(2, 0.01, "b").values()} == {1}


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG = {
    "no pairs": ([1, 2], "write it as"),
    "an empty list": ([], "write it as"),
    "a weight of zero": ([[0, "a"]], "give 1e-9 to 1e9"),
    "a weight that is not finite": ([[float("nan"), "a"]], "give 1e-9 to 1e9"),
    "true for a weight": ([[True, "a"]], "write it as"),
    "one place twice": ([[1, "a"], [2, "a"]], "add up their weights"),
    "a variable": ([[1, "$HOME/a"]], "write out what it stands for"),
}


@pytest.mark.parametrize(("tokens", "remedy"), WRONG.values(), ids=WRONG.keys())
def test_blends_that_mean_nothing_are_refused(tokens, remedy):
    with pytest.raises(ValueError, match=remedy):
        DataSection(tokens=tokens)


@pytest.mark.parametrize("other", [{"folder": "texts"}, {"pattern": "*.md"}, {"max_file_bytes": 5}])
def test_tokens_and_texts_exclude_each_other(other):
    with pytest.raises(ValueError, match=f"leave tokens out, or {next(iter(other))}"):
        DataSection(tokens="a", **other)


def test_sets_that_are_not_there_torn_short_or_of_two_vocabularies_are_refused_at_once(base, monkeypatch):
    def refused(remedy: str, tokens: object, **sections: dict) -> None:
        with pytest.raises(Refused, match=remedy):
            prepare_output(config_of(base, "run", data={"tokens": tokens}, **sections))
        assert not (base / "run").exists()

    one = str(base / "sets/a")
    refused("make it with nsa-dist data build", str(base / "sets/nothing"))
    refused(f"give {one}$", f"{one}.bin")
    refused("take a smaller one, or a larger set", one, run={"sequence_length": 2**20})
    refused("take one that does", one, model={"num_query_groups": 5, "num_attention_heads": 5, "ffn_hidden_size": 50},
            parallel={"tensor_model_parallel_size": 5})  # fmt: skip
    shifted_set(monkeypatch, base / "sets/other", start=0, vocab_size=301)
    refused("build both with the same --tokenizer", [[1, one], [1, str(base / "sets/other")]])
    shifted_set(monkeypatch, base / "sets/single", start=0, num_files=1)
    refused("build it from more files", str(base / "sets/single"))
    file_of(base / "sets/a", "bin").write_bytes(b"")
    refused("it is torn; build it again", one)


def test_a_run_goes_on_with_its_tokens_wherever_they_lie_and_with_no_others(base, monkeypatch):
    config = config_of(base, "run")
    prepare_output(config)
    output = OutputDir(base / "run")
    output.marker().changed(corpus="of tokens that were built anew before the first step").write(output.root)
    prepare_output(config)
    output.marker().changed(corpus=sets.digest_of(config.data)).write(output.root)
    output.metrics.write_text('{"kind": "train", "step": 1}\n')

    def resumed(**data: object) -> TrainConfig:
        return config_of(base, "run", data=data, run={"resume": True})

    prepare_output(resumed())
    (base / "sets").rename(base / "moved")
    moved = [[weight, str(base / "moved" / name)] for name, weight in WEIGHTS.items()]
    with pytest.raises(Refused, match="make it with nsa-dist data build"):
        prepare_output(resumed())
    prepare_output(resumed(tokens=moved))
    weighed = [[1.0, place] for _, place in moved]
    for other in ({"tokens": weighed}, {"tokens": moved[0][1]}, {"tokens": moved, "validation_fraction": 0.5}):
        with pytest.raises(Refused, match="or start a new run in another output_dir"):
            prepare_output(resumed(**other))
    for name in WEIGHTS:
        shifted_set(monkeypatch, base / "sets" / name, start=30)
    with pytest.raises(Refused, match="put them back, or start a new run"):
        prepare_output(resumed())


# --- the launcher and the planner -----------------------------------------------------------------------------------


def test_a_blend_in_a_file_and_as_a_word(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run: {output_dir: runs/a}\ndata: {tokens: [[0.7, sets/a], [3, sets/b]]}\n")
    expected = ((0.7, Path("sets/a")), (3.0, Path("sets/b")))
    assert checked(path).data.token_sets == expected
    assert checked(path, ["tokens=[[0.7, sets/a], [3, sets/b]]"]).data.token_sets == expected
    assert checked(path, ["tokens=sets/c"]).data.token_sets == ((1.0, Path("sets/c")),)
    assert checked(path, ["tokens=null"]).data.token_sets == ()
    assert read_word("[a]", Path) == "[a]"
    moved = checked(path).data.moved(lambda _, place: "/abs" / place)
    assert moved.places == {f"data.tokens /abs/sets/{x}": Path(f"/abs/sets/{x}") for x in "ab"}
    assert DataSection(**json.loads(moved.model_dump_json())) == moved


def test_the_planner_counts_the_vocabulary_of_the_tokens(base):
    config = config_of(base, "run", parallel={"tensor_model_parallel_size": 2})
    assert sets.vocab_size(config) == 300
    assert Shape.of(config, 1, "zigzag").local_vocab == 384 // 2


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_on_tokens_goes_on_as_if_it_had_not_stopped_over_other_ranks(base):
    run_ranks(2, token_runs, base)
    whole, parted = ([record["loss"] for record in records(base, name)] for name in ("whole", "parted"))
    assert len(whole) == len(parted) == 4
    assert parted[:2] == whole[:2]
    assert parted == pytest.approx(whole, rel=1e-5)
    assert whole[0] == pytest.approx(np.log(384), rel=0.05)  # of the padded vocabulary
    assert OutputDir(base / "whole").marker().corpus == sets.digest_of(config_of(base, "whole").data)
    assert not (base / "whole/data").exists()
    model, _ = plain_model(base / "whole")
    assert model.config.vocab_size == len(model.embedding.weight) == 384
    made = sets.read_all(config_of(base, "whole").data)[0]
    assert (model.config.tokenizer, model.config.end_of_document) == (made.tokenizer["kind"], made.end_of_document)
    with pytest.raises(ValueError, match="export the run again with --tokenizer DIR"):
        generate.run(generate.Request(base / "whole", ["1"], 1, Sampling(), "cpu"))
    assert len(records(base, "whole", "validation")) > 0
