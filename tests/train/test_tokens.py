"""Token sets: what is in them, built again after an end at any place, by any number of processes; what is refused."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nsa_dist.train.export import tokenizer as exported
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import DataSection
from nsa_dist.train.tokens import build as building
from nsa_dist.train.tokens import listing, sources, workers
from nsa_dist.train.tokens.build import Request, build
from nsa_dist.train.tokens.listing import file_of

PART = 600  # bytes: several files, and several parts


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"text {i} " * (10 + 7 * i))
    (folder / "below" / os.fsdecode(b"n\xff.txt")).write_text("of a name that is no UTF-8")
    return folder


@pytest.fixture
def request_(texts, tmp_path) -> Request:
    return Request(places=[texts], prefix=tmp_path / "sets/a", part_bytes=PART)


def files(prefix: Path) -> dict[str, bytes]:
    """All that lies beside the set, too."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.iterdir()}


def elsewhere(request: Request) -> Request:
    return replace(request, prefix=request.prefix.parent.with_name("others") / request.prefix.name)


def test_megatron_reads_every_file_as_a_document_with_its_end(request_, texts):
    made = build(request_)
    names = sorted(path.relative_to(texts) for path in texts.rglob("*.txt"))
    expected = [[*(texts / name).read_bytes(), 0] for name in names]
    dataset = IndexedDataset(str(request_.prefix))
    assert [document.tolist() for document in dataset] == expected
    assert dataset.document_indices.tolist() == list(range(len(names) + 1))
    assert (made.documents, made.tokens, made.vocab_size) == (10, sum(map(len, expected)), 256)
    assert files(request_.prefix).keys() == {".bin", ".idx", ".json"}
    assert listing.check_files(request_.prefix) == made


def test_the_same_bytes_by_any_number_of_processes(request_):
    build(request_)
    build(replace(elsewhere(request_), jobs=2))
    assert files(request_.prefix) == files(elsewhere(request_).prefix)


class Killed(BaseException):
    """In place of a kill: nothing catches it."""


def test_what_was_finished_is_not_done_again(request_, monkeypatch):
    written: list[int] = []
    real = building.write

    def write(task):
        if len(written) == 2:
            raise Killed
        written.append(task.number)
        return real(task)

    monkeypatch.setattr(building, "write", write)
    with pytest.raises(Killed):
        build(request_)
    with pytest.raises(Refused, match="make it with nsa-dist data build"):
        listing.read(request_.prefix)
    part = file_of(request_.prefix, "parts") / "000001.bin"
    part.write_bytes(part.read_bytes()[:-2])  # as of a disk that lost it
    monkeypatch.setattr(building, "write", lambda task: written.append(task.number) or real(task))
    seen: list[building.Progress] = []
    build(request_, seen.append)
    assert written == [0, 1, *range(1, max(written) + 1)]
    assert max(written) > 3
    assert [step.done_bytes for step in seen] == sorted(step.done_bytes for step in seen)
    assert 0 < seen[0].done_bytes < seen[-1].done_bytes == seen[-1].bytes
    build(elsewhere(request_))
    assert files(request_.prefix) == files(elsewhere(request_).prefix)


def test_an_end_between_the_files_leaves_no_set_and_the_next_call_makes_it(request_, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(listing.TokenSet, "write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            build(request_)
    assert file_of(request_.prefix, "bin").exists()
    with pytest.raises(Refused, match="giving nsa-dist data build again"):
        listing.read(request_.prefix)
    build(request_)
    listing.check_files(request_.prefix)
    assert not file_of(request_.prefix, "parts").exists()


def test_a_set_that_is_there_is_made_once_and_never_overwritten(request_, texts, monkeypatch):
    made = build(request_)
    with monkeypatch.context() as patched:
        patched.setattr(building, "write", lambda _: pytest.fail("it is made already"))
        assert build(request_) == made
    (texts / "0.txt").write_text("text 0 is another one now")
    before = files(request_.prefix)
    with pytest.raises(Refused, match="take another --out"):
        build(request_)
    assert files(request_.prefix) == before


def test_files_of_others_are_not_overwritten(request_):
    request_.prefix.parent.mkdir()
    file_of(request_.prefix, "bin").write_text("mine")
    with pytest.raises(Refused, match="move them away, or take another --out"):
        build(request_)
    assert files(request_.prefix) == {".bin": b"mine"}


def test_lines_of_json_are_documents_however_they_are_cut(tmp_path):
    lines = [json.dumps({"text": f"line {i} ä\n" * i, "id": i}, ensure_ascii=i % 2 == 0) for i in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    (source,) = sources.find([path], "*", 10**6).sources
    expected = [(f"line {i} ä\n" * i).encode() for i in range(6)]
    for part_bytes in range(1, source.size + 1):
        pieces = list(sources.pieces_of(source, True, part_bytes))
        assert [text for piece in pieces for text in sources.documents(piece, "text")] == expected
    request = Request([path], tmp_path / "sets/a", json_key="text", part_bytes=100)
    made = build(request)
    assert [bytes(document.tolist()) for document in IndexedDataset(str(request.prefix))] == [
        text + b"\0" for text in expected[1:]
    ]
    assert made.left_out == {"number": 1, "first": ["a.jsonl: it is empty"]}


def test_what_is_no_text_is_left_out_and_said_or_refused_where_it_was_named(request_, texts):
    (texts / "table.bin").write_bytes(b"a\0b")
    (texts / "long.txt").write_text(4000 * "long ")
    made = build(replace(request_, max_file_bytes=5000))
    assert made.documents == 10
    assert made.left_out["number"] == 2
    assert "long.txt: it is too large" in made.left_out["first"]
    other = elsewhere(request_)
    with pytest.raises(Refused, match=r"zero bytes.*leave it out"):
        build(replace(other, places=[texts / "0.txt", texts / "table.bin"]))
    with pytest.raises(Refused, match="--max-file-bytes 20000"):
        build(replace(other, places=[texts / "long.txt"], max_file_bytes=5000))
    assert not other.prefix.parent.exists() or not files(other.prefix)


REFUSED = {
    "nothing there": ({"places": [Path("/nowhere/a")]}, "name files or folders"),
    "nothing that matches": ({"pattern": "*.md"}, "name others"),
    "a pattern that goes up": ({"pattern": "../*"}, "such as \\*.txt"),
    "no tokenizer": ({"tokenizer": "nowhere"}, "download the tokenizer and name its folder"),
    "an end for bytes": ({"end_of_document": "x"}, "leave that option out"),
    "JSON lines that are none": ({"json_key": "text"}, "name its key with --json-key"),
    "a name with a variable": ({"prefix": Path("/tmp/$HOME/a")}, "write out what it stands for"),
    "a place below a file": ({"prefix": Path("/etc/passwd/a")}, "name a(nother| folder)"),
}


@pytest.mark.parametrize(("changed", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_built_is_refused_with_a_remedy(request_, changed, remedy):
    with pytest.raises(Refused, match=remedy):
        build(replace(request_, **changed))
    assert not request_.prefix.parent.exists() or not files(request_.prefix)


def test_files_given_twice_and_sets_among_their_texts_are_refused(request_, texts):
    with pytest.raises(Refused, match="name it once"):
        build(replace(request_, places=[texts, texts / "0.txt"]))
    for prefix in (texts / "a", texts / "below/a"):
        with pytest.raises(Refused, match="take a place beside it"):
            build(replace(request_, prefix=prefix))


def test_a_second_build_of_one_set_is_refused(request_, monkeypatch):
    def meet(_):
        with pytest.raises(Refused, match="wait for it"):
            build(request_)
        raise Killed

    monkeypatch.setattr(building, "write", meet)
    with pytest.raises(Killed):
        build(request_)


def test_torn_and_spoiled_sets_are_refused(request_):
    build(request_)
    whole = file_of(request_.prefix, "bin").read_bytes()
    file_of(request_.prefix, "bin").write_bytes(whole[:-2])
    with pytest.raises(Refused, match="torn; build it again"):
        listing.read(request_.prefix)
    file_of(request_.prefix, "bin").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    listing.read(request_.prefix)
    with pytest.raises(Refused, match=r"SHA-256 differs\); build it again"):
        listing.check_files(request_.prefix)
    path = file_of(request_.prefix, "json")
    path.write_text(path.read_text().replace('"vocab_size": 256', '"vocab_size": 257'))
    with pytest.raises(Refused, match="build it again"):
        listing.read(request_.prefix)


def test_processes_that_die_or_fail_end_the_build():
    assert sorted(workers.each(len, ["a", "bc", ""], jobs=2)) == [0, 1, 2]
    with pytest.raises(RuntimeError, match=r"exit code 3.*fewer --jobs"):
        list(workers.each(os._exit, [3, 3], jobs=2))
    with pytest.raises(RuntimeError, match="invalid literal"):
        list(workers.each(int, ["1", "x"], jobs=2))


def tokenizer_folder(folder: Path) -> Path:
    """A byte-level BPE whose file truncates and pads, as many do, with a token that texts may spell out."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["hello there, hello text"] * 9, trainer)
    made.enable_truncation(8)
    made.enable_padding()
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return folder


def test_a_tokenizer_of_hugging_face(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    texts = ["hello <end> text, " * 9, "hällo"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "2.txt").write_bytes(b"\xff hello")
    places = [tmp_path / f"{i}.txt" for i in range(3)]
    request = Request(places[:2], tmp_path / "sets/a", tokenizer=str(folder))
    made = build(request)
    documents = [document.tolist() for document in IndexedDataset(str(request.prefix))]
    from tokenizers import Tokenizer, decoders

    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.decoder = decoders.ByteLevel()
    assert [model.decode(document[:-1]) for document in documents] == texts
    end = model.token_to_id("<end>")
    assert [np.flatnonzero(np.array(document) == end).tolist() for document in documents] == [
        [len(document) - 1] for document in documents
    ]
    assert (made.vocab_size, made.end_of_document) == (model.get_vocab_size(), end)
    with pytest.raises(Refused, match=r"not UTF-8.*leave it out"):
        build(replace(request, places=places, prefix=tmp_path / "sets/b"))
    with pytest.raises(Refused, match="name one that is"):
        build(replace(request, end_of_document="<nothing>"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(Refused, match="name it with --end-of-document"):
        build(request)


def test_a_run_is_exported_with_the_tokenizer_of_its_tokens_alone(tmp_path, monkeypatch):
    folder = tokenizer_folder(tmp_path / "tokenizer")
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("hello there " * (i + 1), encoding="utf-8")
    places, prefix = [tmp_path / f"{i}.txt" for i in range(2)], tmp_path / "sets/a"
    build(Request(places, prefix, tokenizer=str(folder)))
    run = SimpleNamespace(data=DataSection(folder=None, tokens=str(prefix)))
    monkeypatch.setattr(exported, "config_of", lambda _: run)
    files = exported.tokenizer_files(tmp_path, folder)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "tokenizer_config.json").unlink()
    assert json.loads(exported.tokenizer_files(tmp_path, folder)["tokenizer_config.json"])["eos_token"] == "<end>"
    with pytest.raises(Refused, match=r"nothing was given.*give --tokenizer DIR"):
        exported.tokenizer_files(tmp_path, None)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match=r"one number would be two tokens; give the folder as it was then"):
        exported.tokenizer_files(tmp_path, folder)
    run.data = DataSection(folder=str(tmp_path))
    assert exported.tokenizer_files(tmp_path, None) == {}
    with pytest.raises(Refused, match=r"are bytes, which need no folder; leave it out"):
        exported.tokenizer_files(tmp_path, folder)


def test_a_tokenizer_without_its_package_or_its_file_says_what_to_do(request_, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with pytest.raises(Refused, match="save_pretrained"):
        build(replace(request_, tokenizer=str(folder)))
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Refused, match=r"pip install 'nsa-dist\[tokens\]'"):
        build(replace(request_, tokenizer=str(folder), end_of_document="x"))
