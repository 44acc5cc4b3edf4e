"""Drawn tasks: whether answers follow from the texts, what a sample holds, how they are mixed in and counted."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nsa_dist.cp.plan import ShardPlan
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.config_errors import parse
from nsa_dist.train.data.batches import BatchCutter, _with_tasks
from nsa_dist.train.prepare import check_output, prepare_output
from nsa_dist.train.sections.data import LEAST_TASK_LENGTH
from nsa_dist.train.tasks import score
from nsa_dist.train.tasks.drawing import Answer, Drawn
from nsa_dist.train.tasks.kinds import TASKS
from nsa_dist.train.tasks.source import TaskSamples, held_out_samples
from train_cases import small_config, write_texts

LENGTHS = [LEAST_TASK_LENGTH, 129, 257, 1024, 4096, 16384]


def drawn(task: str, n: int, length: int = 1024, split: str = "train") -> Drawn:
    return TaskSamples(task, (length,), 4096, 7, split).texts(n)[0]


def solved(task: str, before: bytes, size: int) -> tuple[bytes, int]:
    """The next `size` bytes after `before`, and the place of the evidence, read as a person would."""
    if task == "copy":
        middle = before.index(b"|")
        place = len(before) - middle - 1
        return before[place : place + size], place
    if task == "recall":
        width = 2 if len(before) < 8192 else 3
        found = re.search(rb"%s(\d) " % before[-width:], before)
        return found[1], found.start()
    asked = re.search(rb"The (?:pass key|(?:number|value) of ([A-Z]{3})) is $", before)
    if task == "passkey":
        found = re.search(rb"The pass key is (\d{5})\. Remember it\.", before)
    elif task == "needle":
        found = re.search(rb"The number of %s is (\d{5})\. " % asked[1], before)
    else:
        found = name = re.search(rb"Let %s be (?:as ([A-Z]{3})|(\d{5}))\. " % asked[1], before)
        while name[1]:
            name = re.search(rb"Let %s be (?:as ([A-Z]{3})|(\d{5}))\. " % name[1], before[: name.start()])
        return name[2], found.start()
    return found[1], found.start()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_every_answer_follows_from_what_stands_before_it(task, length):
    for n in range(20 if length < 4096 else 2):
        text, answers = (it := drawn(task, n, length)).text, it.answers
        assert len(text) <= length, "and what is left is less than one more letter or pair"
        assert len(text) > length - (2 if task == "copy" else 1)
        assert answers
        for answer in answers:
            expected, place = solved(task, text[: answer.start], answer.stop - answer.start)
            assert text[answer.start : answer.stop] == expected
            assert answer.depth == pytest.approx(place / length)
        assert b"\0" not in text


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_not_known_before_they_are_asked_for(task):
    first = [it.text[it.answers[0].start : it.answers[0].stop] for it in (drawn(task, n) for n in range(40))]
    assert len(set(first)) >= (8 if task == "recall" else 39)


@pytest.mark.parametrize("task", TASKS)
def test_evidence_stands_at_every_depth(task):
    depths = [answer.depth for n in range(200) for answer in drawn(task, n).answers]
    parts = {int(depth * score.DEPTHS) for depth in depths}
    most = {"copy": 3, "recall": 4}.get(task, 5)  # the rest of their texts is questions
    assert parts >= set(range(most))
    assert all(0 <= depth < 1 for depth in depths)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_seed_split_and_number(task):
    again, texts = [[drawn(task, n).text for n in (0, 1, 10**9)] for _ in range(2)]
    assert again == texts
    others = [drawn(task, 0, split="validation").text, TaskSamples(task, (1024,), 4096, 8, "train").texts(0)[0].text]
    assert len({*texts, *others}) == 5


def test_tracking_has_chains_of_every_length():
    found = {drawn("tracking", n, 4096).text.count(b" be as ") for n in range(60)}
    assert 8 <= min(found) < 16 < max(found) <= 32, "eight chains of one to four steps"
    assert {len(drawn("tracking", n, 4096).answers) for n in range(9)} == {8}


def test_recall_has_few_pairs_and_many():
    numbers = []
    for n in range(60):
        it = drawn("recall", n, 4096)
        keys = [it.text[answer.start - 2 : answer.start] for answer in it.answers]
        assert len(set(keys)) == len(keys), "none is asked for twice"
        numbers.append(len(re.findall(rb"\d ", it.text)) - len(keys))
    assert max(numbers) > 400
    assert sum(number < 30 for number in numbers) > 15, "half of them, as 768 are the most"


def test_needles_are_one_to_eight():
    assert {drawn("needle", n, 4096).text.count(b"The number of ") for n in range(60)} == set(range(2, 18, 2))


@pytest.mark.parametrize("task", TASKS)
def test_answers_alone_weigh_and_together_as_much_as_a_text(task):
    samples = TaskSamples(task, (1024, 256), 4096, 7, "train")
    lengths = set()
    for n in range(20):
        sample, it = samples[n], samples.texts(n)[0]
        row = torch.cat([sample["tokens"], sample["labels"][-1:]])
        assert bytes(row[: len(it.text)].tolist()) == it.text
        assert not row[len(it.text) :].any()
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        weighed = sample["loss_mask"].nonzero().flatten()
        assert weighed.tolist() == sorted(p - 1 for a in it.answers for p in range(a.start, a.stop))
        assert torch.equal(sample["loss_mask"], sample["loss_mask"].round())
        assert 2048 < sample["loss_mask"].sum() <= 4096
        lengths.add(1024 if len(it.text) > 256 else 256)
    assert lengths == {1024, 256}


@pytest.mark.parametrize("task", TASKS)
def test_packed_texts_fill_the_row_and_stand_apart(task):
    """Each as it would be alone at the beginning; the last is followed by what fills the row."""
    samples = TaskSamples(task, (1024, 300), 2500, 7, "train", packed=True)
    lengths = set()
    for n in range(20):
        sample, texts = samples[n], samples.texts(n)
        length = min(start for start in texts if start)
        assert list(texts) == [i * length for i in range(2500 // length)]
        assert sample["cu_seqlens"].tolist() == [*texts, 2500]
        weighed, inside = [], []
        for start, it in texts.items():
            row = sample["tokens"][start : start + len(it.text)]
            assert bytes(row.tolist()) == it.text
            weighed += [start + p - 1 for a in it.answers for p in range(a.start, a.stop)]
            stop = start + length if start + 2 * length <= 2500 else 2500
            inside += range(stop - start)
        assert sorted(weighed) == sample["loss_mask"].nonzero().flatten().tolist()
        assert len(sample["loss_mask"].unique()) == 2
        assert 1250 < sample["loss_mask"].sum() <= 2500
        assert sample["position_ids"].tolist() == inside
        lengths.add(length)
    assert lengths == {1024, 300}


def check(**data) -> TrainConfig:
    return parse(TrainConfig, {"run": {"output_dir": "x", "sequence_length": 4096}, "data": data}, "a.yaml")


def test_shares_are_of_the_training_samples():
    texts = SimpleNamespace(kind="text")
    mixed = _with_tasks(texts, check(tasks={"recall": 0.25, "copy": 0.1}))
    which = np.array([mixed.place(n)[0] for n in range(100)])
    assert np.bincount(which).tolist() == [65, 25, 10]
    assert {mixed._sets[i].task for i in (1, 2)} == {"recall", "copy"}
    assert mixed._sets[1].split == "train"
    assert _with_tasks(texts, check()) is texts
    alone = _with_tasks(texts, check(tasks={"recall": 0.5, "copy": 0.5}))
    assert len(alone._sets) == 2, "no text"


def test_lengths_halve_from_the_sequence_down():
    assert check(tasks={"copy": 1}).task_lengths == [4096, 2048, 1024, 512]
    assert check(tasks={"copy": 1}, task_lengths=[512, 4096]).task_lengths == [4096, 512]
    assert check().task_lengths == []


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ({"tasks": {"recal": 0.5}}, r"data\.tasks\.recal"),
        ({"tasks": {"recall": True}}, "the share of recall is a number.*give one"),
        ({"tasks": {"recall": 0}}, "give 1e-6 to 1, or leave recall out"),
        ({"tasks": {"recall": 0.7, "copy": 0.4}}, "sum to 1.1.*give shares that sum to 1 or less"),
        ({"tasks": {"recall": 0.5}, "tokens": "some/where"}, "leave tokens out and give data.folder, or leave tasks"),
        ({"task_lengths": [512]}, "give tasks, such as .*or leave it out"),
        ({"tasks": {"recall": 0.5}, "task_lengths": [8192]}, "give lengths from 128 to sequence_length"),
        ({"tasks": {"recall": 0.5}, "task_lengths": [64]}, "give lengths from 128 to sequence_length"),
        ({"tasks": {"recall": 0.5}, "task_lengths": []}, "give lengths from 128 to sequence_length"),
    ],
)
def test_what_no_run_can_do_is_refused(data, remedy):
    with pytest.raises(ValueError, match=remedy):
        check(**data)


def test_a_run_goes_on_with_its_own_tasks_alone(tmp_path):
    write_texts(tmp_path / "texts")
    config = small_config(tmp_path, "run")
    prepare_output(config)
    (tmp_path / "run/metrics.jsonl").write_text("")
    tasks = {**config.data.model_dump(), "tasks": {"copy": 0.5}}
    with pytest.raises(ValueError, match=r"data\.tasks: the run has {}, given is {'copy': 0\.5}"):
        check_output(small_config(tmp_path, "run", data=tasks).resuming())


def test_an_answer_counts_whole_in_its_length_and_depth(monkeypatch):
    """All bytes of sample 0 are likeliest, of sample 1 all but one, of sample 2 none."""
    config = small_config(Path("nowhere"), "x", data={"tasks": {"copy": 0.5}, "task_lengths": [128]})
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"global_batch_size": 3, "micro_batch_size": 1})}
    )
    samples = held_out_samples(config, "copy", 128)
    rows = [torch.ones(1, 256, dtype=torch.bool) for _ in range(3)]
    spoiled = samples.texts(1)[0].answers[2]
    rows[1][0, spoiled.stop - 2] = False
    rows[2].zero_()
    monkeypatch.setattr(score, "_right", lambda *_: rows)
    monkeypatch.setattr(score.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    world = SimpleNamespace(cp=SimpleNamespace(rank=0), dp_rank=0, dp_size=1, device="cpu", sum=lambda x: x)
    plan = ShardPlan.zigzag([0, 256], 1, 16)
    model = SimpleNamespace(module=torch.nn.Identity())
    record = score.task_record(config, model, BatchCutter(config, world, plan), 5, world)
    answers = [len(samples.texts(n)[0].answers) for n in range(3)]
    assert answers == [8, 8, 8]
    assert record["step"] == 5
    assert record["tasks"]["copy"]["answers"] == 24
    assert record["tasks"]["copy"]["accuracy"] == pytest.approx(15 / 24)
    by_depth = record["tasks"]["copy"]["by_length"]["128"]["by_depth"]
    assert by_depth[0] == pytest.approx((4 + 3) / 12), "of four answers a text in the first fifth one was spoiled"
    assert by_depth[1] == pytest.approx(2 / 3)
    assert by_depth[3:] == [None, None], "the second half is the copy"


def test_the_likeliest_token_over_tensor_parallel_ranks(monkeypatch):
    logits = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    labels = logits.argmax(-1)
    labels[1, 3] = (labels[1, 3] + 1) % 12
    expected = torch.ones(2, 5)
    expected[1, 3] = 0
    halves = logits.split(6, -1)
    best = torch.stack([half.max(-1).values for half in halves])
    token = torch.stack([half.argmax(-1) + 6 * rank for rank, half in enumerate(halves)])
    monkeypatch.setattr(score.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    for rank, half in enumerate(halves):
        gathered = iter([best, token])
        comm = SimpleNamespace(rank=rank, size=2, all_gather=lambda x, kind, gathered=gathered: next(gathered))
        monkeypatch.setattr(score, "Comm", lambda group, comm=comm: comm)
        assert torch.equal(score._is_likeliest(labels, half, non_loss_data=True).float(), expected)
    assert Answer(3, 4, 0.5).depth == 0.5
