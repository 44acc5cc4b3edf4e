"""The corpus, the output folder, metrics and pictures: no process group."""

import io
import json
import sysconfig
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console

from nsa_dist import NSAConfig
from nsa_dist.train.config import END_OF_DOCUMENT
from nsa_dist.train.data.corpus import find_files, split_files
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.files.metrics import MetricsLog
from nsa_dist.train.files.plots import CHOSEN, FORCED, FUTURE, VISIBLE, selection_map
from nsa_dist.train.files.records import MetricsFollower, read_metrics
from nsa_dist.train.sections.data import DataSection
from nsa_launch.progress import TrainProgress
from train_cases import write_texts

# --- corpus ---------------------------------------------------------------------------------------------------------


def test_training_and_validation_share_no_file_and_no_content(tmp_path):
    folder = write_texts(tmp_path / "texts", num_files=20)
    (folder / "copy.txt").write_text((folder / "3.txt").read_text())
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"text\0and more")
    (folder / ".hidden").write_text("secret")
    files = find_files(DataSection(folder=folder, pattern="*"))
    assert sorted(f.name for f in files) == sorted(f"{i}.txt" for i in range(20))
    splits = split_files(files, 0.2)
    names = {split: {f.name for f in part} for split, part in splits.items()}
    assert len(names["validation"]) == 4
    assert names["train"] | names["validation"] == {f.name for f in files}
    assert names["train"].isdisjoint(names["validation"])
    assert {f.content for f in splits["train"]}.isdisjoint(f.content for f in splits["validation"])


def test_the_split_depends_on_names_alone(tmp_path):
    files = find_files(DataSection(folder=write_texts(tmp_path)))
    assert split_files(files[::-1], 0.3) == split_files(files, 0.3)


def test_files_are_stored_as_their_bytes(tmp_path):
    data = DataSection(folder=write_texts(tmp_path / "texts"), validation_fraction=0.25)
    write_corpus(data, tmp_path / "data")
    listing = json.loads((tmp_path / "data/corpus.json").read_text())
    for split in ("train", "validation"):
        stored = IndexedDataset(str(tmp_path / "data" / split))
        assert len(stored) == len(listing[split]["files"])
        for tokens, name in zip(stored, listing[split]["files"], strict=True):
            assert bytes(tokens.tolist()) == (tmp_path / "texts" / name).read_bytes() + bytes([END_OF_DOCUMENT])


def test_the_default_corpus_is_the_standard_library():
    files = find_files(DataSection())
    names = {f.name for f in files}
    assert {"json/decoder.py", "dataclasses.py", "asyncio/tasks.py"} <= names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert sum(len(f.content) for f in files) > 5_000_000
    assert (Path(sysconfig.get_paths()["stdlib"]) / "dataclasses.py").read_bytes() in {f.content for f in files}


def test_a_corpus_needs_two_files(tmp_path):
    write_texts(tmp_path, num_files=1)
    with pytest.raises(ValueError, match="name another folder or pattern"):
        find_files(DataSection(folder=tmp_path))


# --- metrics and progress -------------------------------------------------------------------------------------------


def test_a_follower_sees_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.poll() == []
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert follower.poll() == [{"kind": "train", "step": 1}]
    assert follower.poll() == []
    with path.open("a") as file:
        file.write('ain", "step": 2}\n')
    assert follower.poll() == [{"kind": "train", "step": 2}]


def test_a_torn_line_is_dropped_and_the_later_record_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 3}\n{"kind": "train", "step": 2, "loss": 2}\n{"kind": "tra')
    with MetricsLog(path, tmp_path / "tensorboard", first_step=2) as log:
        log.write({"kind": "train", "step": 2, "loss": 2.5})
        log.write({"kind": "validation", "step": 2, "loss": 4.0})
    assert [r["loss"] for r in read_metrics(path, "train")] == [3, 2.5]
    assert [r["loss"] for r in read_metrics(path, "validation")] == [4.0]


def test_progress_shows_what_it_is_fed():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with TrainProgress(total_steps=40, console=console) as bar:
        bar.feed({"kind": "validation", "step": 0, "loss": 5.5})
        bar.feed({"kind": "tasks", "step": 0, "tasks": {"recall": {"accuracy": 0.125}}})
        bar.feed({"kind": "train", "step": 10, "loss": 3.25, "tokens_per_s": 12345.6})
    shown = console.file.getvalue()
    assert all(text in shown for text in ("10/40", "3.2500", "5.5000", "12,346", "recall 12.5%"))


# --- the map of selected blocks -------------------------------------------------------------------------------------

SIZES = NSAConfig(8, 4, 16, 4, 1, 2, 20)


def test_selection_map_tells_forced_from_chosen():
    blocks = torch.full((96, 4), -1, dtype=torch.int32)
    blocks[95] = torch.tensor([0, 2, 4, 5])
    blocks[20, :2] = torch.tensor([0, 1])
    picture = selection_map(blocks, SIZES)
    assert picture[95].tolist() == [FORCED, VISIBLE, CHOSEN, VISIBLE, FORCED, FORCED]
    assert picture[20].tolist() == [FORCED, FORCED, FUTURE, FUTURE, FUTURE, FUTURE]


def test_selection_map_of_a_long_sequence_is_thinned_out():
    num_tokens = 64_000
    own = torch.arange(num_tokens, dtype=torch.int32) // 16
    blocks = torch.stack([torch.zeros_like(own), own // 2, (own - 1).clamp(min=0), own], -1)
    picture = selection_map(blocks, SIZES)
    assert max(picture.shape) <= 1024
    assert (picture[:, 0] == FORCED).all()
    assert picture[-1, -1] == FORCED
    assert picture[-1, picture.shape[1] // 2 - 1] == CHOSEN
    assert picture[0, -1] == FUTURE
