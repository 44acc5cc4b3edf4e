"""Folders that cannot be used, and texts that cannot be a run's: refused by the command at once, before Ray starts."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch_cases import tiny, tiny_file
from nsa_dist.train.data.corpus import candidates, find_files
from nsa_dist.train.sections.data import DataSection
from nsa_launch import cli, exit_codes
from nsa_launch.on_ray import driver
from train_cases import write_texts


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """What the command says when it refuses the words; nothing was started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(driver, "run", lambda *_: pytest.fail("it was started"))

    def refused(*words: str) -> str:
        assert cli.main(["train", str(tiny_file(tmp_path)), *words]) == exit_codes.BAD_CONFIG
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("nsa-dist: ")
        return captured.err

    return refused


@pytest.mark.parametrize("words", [[], ["resume=true"], ["overwrite=true"]], ids=["", "resume", "overwrite"])
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("file", "is not a folder, and a run needs a folder for its files; name another one"),
        ("file/run", "which is not a folder; name a folder that can be written to"),
        ("file/a/b/run", "which is not a folder; name a folder that can be written to"),
        ("dangling", "is a symbolic link to nowhere, and a run needs a folder for its files; name another one"),
        ("dangling/run", "is a symbolic link to nowhere, and a run needs a folder for its files; name another one"),
        ("loop/run", "name another one"),
        ("pipe", "is not a folder"),
        (255 * "é", "take a shorter one"),
    ],
)
def test_an_output_folder_that_cannot_be_one_is_refused(tmp_path, refusal, name, remedy, words):
    (tmp_path / "file").write_text("f")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    assert remedy in refusal(f"output_dir={tmp_path / name}", *words)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "tiny.yaml"])


@pytest.mark.parametrize("below", [".", "new", "new/run"])
def test_a_folder_that_is_read_only_is_refused(tmp_path, refusal, monkeypatch, below):
    """As `access` says it: whoever runs the tests may be allowed everything."""
    place, access = tmp_path / "read-only", os.access
    place.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == place and mode & os.W_OK))
    assert "is read-only, or not ours; name a folder that can be written to" in refusal(f"output_dir={place / below}")


def test_a_read_only_file_system_is_refused(refusal):
    assert "name a" in refusal("output_dir=/proc/self/run")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "x"), PermissionError(13, "Permission denied", "x")]
)
def test_what_the_file_system_says_before_the_start_is_a_refusal(refusal, monkeypatch, error):
    from nsa_launch import run_folder

    def failing(*_):
        raise error

    monkeypatch.setattr(run_folder, "write_atomically", failing)
    assert f"({error.strerror}: x), and the run's files go there; name a folder" in refusal()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("nowhere", "is not a folder, and the texts of the run come from it; name another"),
        ("file", "is not a folder, and the texts of the run come from it; name another"),
        ("dangling", "is not a folder, and the texts of the run come from it; name another"),
        ("empty", "holds 0 different text files"),
        ("one", "holds 1 different text files"),
        ("short", "sequence_length=256 is more than the 204 tokens of the training texts"),
    ],
)
def test_texts_that_cannot_be_a_runs_are_refused_at_once(tmp_path, refusal, name, remedy):
    (tmp_path / "file").write_text("f")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    write_texts(tmp_path / "one", num_files=1)
    (tmp_path / "short").mkdir()
    for i in range(4):
        (tmp_path / "short" / str(i)).write_text(50 * str(i))
    assert remedy in refusal(f"folder={tmp_path / name}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["stpes=3"],
        ["lr=.inf"],
        ["steps=1:30"],
        ["seed=" + 26 * "9"],
        ["resume=true", "overwrite=true"],
        ["output_dir=$USER/run"],
        ["output_dir=file/run"],
        ["folder=nowhere"],
        ["sequence_length=200000000"],
        ["launch.env.HF_TOKEN=null"],
        ["head_groups=0"],
        ["processes_per_node=3"],
        ["latin.yaml"],
        ["nested.yaml"],
    ],
    ids=lambda words: words[0][:30],
)
def test_a_refusal_waits_for_no_library_that_takes_seconds(tmp_path, words):
    """torch, Megatron-core and Ray take most of a start: which were imported is looked at, not a clock."""
    (tmp_path / "file").write_text("f")
    (tmp_path / "latin.yaml").write_bytes("run: {output_dir: é}".encode("latin-1"))
    (tmp_path / "nested.yaml").write_text("[" * 3000)
    code = (
        "import sys; from nsa_launch.cli import main; code = main(sys.argv[1:]); "
        "late = {'torch', 'triton', 'ray', 'megatron', 'matplotlib', 'tensorboard', 'numpy'} & sys.modules.keys(); "
        "assert not late, late; sys.exit(code)"
    )
    words = words if words[0].endswith(".yaml") else [str(tiny_file(tmp_path)), *words]
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "RAY_ADDRESS")}
    command = [sys.executable, "-c", code, "train", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert ended.returncode == exit_codes.BAD_CONFIG, ended.stderr
    assert ended.stderr.startswith("nsa-dist: ")
    assert len(ended.stderr.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


# --- which files are texts ------------------------------------------------------------------------------------------


def test_a_file_that_is_too_large_is_never_read(tmp_path, monkeypatch):
    write_texts(tmp_path, num_files=3)
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(6 * 2**30)
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), read_bytes(path))[1])
    assert [file.name for file in find_files(DataSection(folder=tmp_path))] == ["0.txt", "1.txt", "2.txt"]
    assert "huge.txt" not in read


def test_a_file_may_have_a_name_that_is_not_utf_8(tmp_path):
    write_texts(tmp_path / "texts", num_files=3)
    os.rename(tmp_path / "texts/1.txt", os.fsencode(tmp_path / "texts") + b"/\xff.txt")
    data = DataSection(folder=tmp_path / "texts", validation_fraction=0.3)
    from nsa_dist.train.data.packing import write_corpus

    digest = write_corpus(data, tmp_path / "data")
    assert write_corpus(data, tmp_path / "data", expected=digest) == digest


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_texts(tmp_path, num_files=3)

    def refusing(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refusing)
    with pytest.raises(ValueError, match=r"0\.txt' cannot be read \(Permission denied\).*make it readable"):
        find_files(DataSection(folder=tmp_path))


@contextmanager
def a_run_in(folder: Path):
    from nsa_launch.run_folder import claimed

    with claimed(tiny(folder.parent, f"output_dir={folder}")) as made:
        yield made


def test_no_runs_files_are_texts(tmp_path):
    """Neither this one's nor another's, which lies in the folder of the texts as well."""
    texts = write_texts(tmp_path / "texts", num_files=3)
    with a_run_in(texts / "other"), a_run_in(texts / "this"):
        (texts / "other/logs/rank-0000.log").write_text("what a rank printed")
        (texts / "foreign").mkdir()
        (texts / "foreign/run.json").write_text("{}")
        names = candidates(DataSection(folder=texts), but_not=texts / "this")
    assert list(names) == ["0.txt", "1.txt", "2.txt", "foreign/run.json", "tiny.yaml"]


def test_texts_in_the_runs_own_folder_are_texts(tmp_path):
    texts = write_texts(tmp_path / "run/texts", num_files=3)
    with a_run_in(tmp_path / "run"):
        assert list(candidates(DataSection(folder=texts), but_not=tmp_path / "run")) == ["0.txt", "1.txt", "2.txt"]
