"""The order of samples: a function of corpus, sequence length, seed and the sample's number, of nothing else."""

from collections import Counter

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nsa_dist.train.config import END_OF_DOCUMENT
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.data.samples import Samples
from nsa_dist.train.sections.data import DataSection
from train_cases import write_texts

LENGTH = 64
PINNED = [282, 453, 677, 639, 741]  # the first samples' places in epoch 0


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> IndexedDataset:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(DataSection(folder=write_texts(folder / "texts")), folder / "data")
    return IndexedDataset(str(folder / "data/train"))


def stream(samples: Samples) -> list[int]:
    """The tokens of one epoch, each sample in its place of the stream."""
    places = np.argsort(samples._order(0))
    return torch.cat([samples[int(n)]["tokens"] for n in places]).tolist()


def test_an_epoch_has_every_token_of_whole_samples_once(documents):
    samples = Samples(documents, LENGTH, seed=3)
    tokens = [documents[int(i)] for i in samples._shuffled]
    expected = np.concatenate(tokens).tolist()
    assert samples.per_epoch == len(expected) // LENGTH > 100
    assert stream(samples) == expected[: samples.per_epoch * LENGTH]
    assert expected.count(END_OF_DOCUMENT) == len(documents)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_has_each_sample_once_in_an_order_of_its_own(documents, epoch):
    samples = Samples(documents, LENGTH, seed=3)
    size = samples.per_epoch
    seen = [tuple(samples[n]["tokens"].tolist()) for n in range(epoch * size, (epoch + 1) * size)]
    first = [tuple(samples[n]["tokens"].tolist()) for n in range(size)]
    assert Counter(seen) == Counter(first)
    assert (seen == first) == (epoch == 0)


def test_a_label_is_the_next_token(documents):
    samples = Samples(documents, LENGTH, seed=3)
    by_place = {int(place): samples[n] for n, place in enumerate(samples._order(0))}
    for place, sample in by_place.items():
        assert torch.equal(sample["labels"][:-1], sample["tokens"][1:])
        if place + 1 in by_place:
            assert sample["labels"][-1] == by_place[place + 1]["tokens"][0]
        assert sample["loss_mask"].tolist() == LENGTH * [1.0]
        assert sample["position_ids"].tolist() == list(range(LENGTH))


def test_the_order_is_that_of_the_seed_and_stays_for_good(documents):
    assert not torch.equal(Samples(documents, LENGTH, 3)[0]["tokens"], Samples(documents, LENGTH, 4)[0]["tokens"])
    again = Samples(documents, LENGTH, 3)
    backwards = [again[n]["tokens"] for n in range(40, -1, -1)]
    assert all(torch.equal(Samples(documents, LENGTH, 3)[40 - i]["tokens"], t) for i, t in enumerate(backwards))
    # These numbers are in checkpoints: another order would repeat samples of runs that go on.
    assert Samples(documents, LENGTH, 3)._order(0)[:5].tolist() == PINNED


def test_a_stream_shorter_than_a_sample_goes_on_at_its_beginning(documents):
    total = int(documents.sequence_lengths.sum())
    samples = Samples(documents, 2 * total + 10, seed=0)
    tokens = samples[0]["tokens"]
    assert samples.per_epoch == 1
    assert torch.equal(tokens[:total], tokens[total : 2 * total])
    assert torch.equal(samples[0]["tokens"], samples[5]["tokens"])
    assert samples[0]["labels"][-1] == tokens[10]
