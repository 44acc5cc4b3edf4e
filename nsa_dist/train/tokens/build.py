"""A token set from texts: parts written side by side, then joined; the same bytes for any number of processes.

A part that an earlier call finished is not written again. Nothing counts at `prefix` before its JSON is there, and that
comes last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nsa_dist.train.data.corpus import file_digest
from nsa_dist.train.files.atomic import sync, sync_folder
from nsa_dist.train.files.lock import lock as hold
from nsa_dist.train.files.places import check_name, check_writable
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens import listing, sources, workers
from nsa_dist.train.tokens.listing import KINDS, TokenSet, file_of
from nsa_dist.train.tokens.parts import Part, Task, begin_file, write
from nsa_dist.train.tokens.tokenizers import BYTES, Tokenizer, opened

TEXT_BYTES = 2**26  # the longest text that is read, whole, by one process
PART_BYTES = 2**26
_NAMED = 20  # of what is left out


@dataclass(frozen=True)
class Request:
    """`prefix` is absolute. `json_key`: files are JSON lines, a document each, its text under this key.

    max_file_bytes    None: TEXT_BYTES; JSON lines are read line by line, so they have no bound then
    """

    places: Sequence[Path]
    prefix: Path
    tokenizer: str = BYTES
    end_of_document: str | None = None
    json_key: str | None = None
    pattern: str = "*"
    max_file_bytes: int | None = None
    jobs: int = 1
    part_bytes: int = PART_BYTES


@dataclass(frozen=True)
class Progress:
    """What is done, of how much; bytes are those of the texts."""

    done_bytes: int
    bytes: int
    documents: int
    tokens: int


def build(request: Request, said: Callable[[Progress], None] = lambda _: None) -> TokenSet:
    """The set at `request.prefix`, made now or by an earlier call of the same texts. Refused with what to do."""
    tokenizer = opened(request.tokenizer, request.end_of_document)
    _check_places(request)
    most = request.max_file_bytes or (TEXT_BYTES if request.json_key is None else 2**63 - 1)
    found = sources.find(request.places, request.pattern, most)
    pieces = [p for s in found.sources for p in sources.pieces_of(s, request.json_key is not None, request.part_bytes)]
    about = json.dumps(tokenizer.about, sort_keys=True)
    folder = file_of(request.prefix, "parts")
    tasks = [
        Task(folder, n, part, request.tokenizer, request.end_of_document, about, request.json_key)
        for n, part in enumerate(sources.parts_of(pieces, request.part_bytes))
    ]
    begun = folder / "begun"
    made = _made(request.prefix, tasks, tokenizer, begun)
    if made is None:
        with _locked(folder):
            begun.touch()
            made = _join(request.prefix, tasks, _parts(tasks, request.jobs, said), tokenizer, found.left_out)
    shutil.rmtree(folder, ignore_errors=True)  # a process of a call that was killed may still write there
    return made


def _parts(tasks: Sequence[Task], jobs: int, said: Callable[[Progress], None]) -> list[Part]:
    """All of them, in order."""
    parts = [part for task in tasks if (part := task.done())]
    finished = {part.number for part in parts}
    total = sum(task.size for task in tasks)

    def say() -> None:
        done, documents, tokens = (sum(getattr(p, name) for p in parts) for name in ("size", "documents", "tokens"))
        said(Progress(done, total, documents, tokens))

    say()
    for part in workers.each(write, [task for task in tasks if task.number not in finished], jobs):
        parts.append(part)
        say()
    return sorted(parts, key=lambda part: part.number)


def _join(
    prefix: Path, tasks: Sequence[Task], parts: Sequence[Part], tokenizer: Tokenizer, large: Sequence[str]
) -> TokenSet:
    left_out = [*(f"{name}: it is too large" for name in large), *(text for part in parts for text in part.left_out)]
    if not any(part.documents for part in parts):
        raise Refused(f"no document is left of {left_out[0]!r} and others; name files of text")
    draft = tasks[0].folder / "whole"
    builder = begin_file(Path(f"{draft}.bin"), tokenizer.vocab_size)
    for task, part in zip(tasks, parts, strict=True):
        if part.documents:  # Megatron reads no index without any
            builder.add_index(str(task.prefix))
    builder.finalize(f"{draft}.idx")
    drafts = {kind: Path(f"{draft}.{kind}") for kind in KINDS}
    made = TokenSet(
        tokenizer=tokenizer.about,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        sources={
            "files": len({piece.source.path for task in tasks for piece in task.pieces}),
            "bytes": sum(task.size for task in tasks),
            "names": _names(tasks),
            "sha256": hashlib.sha256("".join(part.sources for part in parts).encode()).hexdigest(),
        },
        left_out={"number": len(left_out), "first": left_out[:_NAMED]},
        bytes={kind: path.stat().st_size for kind, path in drafts.items()},
        sha256={kind: file_digest(path) for kind, path in drafts.items()},
    )
    for kind, path in drafts.items():
        sync(path)
        os.replace(path, file_of(prefix, kind))
    sync_folder(prefix.parent)
    made.write(prefix)
    return made


def _made(prefix: Path, tasks: Sequence[Task], tokenizer: Tokenizer, begun: Path) -> TokenSet | None:
    """What is at `prefix` already. Refused unless it was made of the same texts, by a finished call or a killed one."""
    path = file_of(prefix, "json")
    if not path.exists():
        strangers = [file_of(prefix, kind).name for kind in KINDS if file_of(prefix, kind).exists()]
        if strangers and not begun.exists():
            raise Refused(
                f"{', '.join(strangers)} in {prefix.parent} would be overwritten, and no build began them; move them "
                f"away, or take another --out"
            )
        return None
    made = listing.read(prefix)
    when = path.stat().st_mtime_ns
    newer = [p.source.path for task in tasks for p in task.pieces if p.source.changed_ns > when]
    if made.sources["names"] != _names(tasks) or made.tokenizer != tokenizer.about or newer:
        why = f"{newer[0]} has changed since" if newer else "it was made of other texts or by another tokenizer"
        raise Refused(f"{prefix} is a token set already, and {why}; take another --out, or remove its three files")
    return made


def _names(tasks: Sequence[Task]) -> str:
    """SHA-256 of the names and sizes of all files, and of how they are read."""
    pieces = [[p.source.name, p.source.size, p.start, p.end] for task in tasks for p in task.pieces]
    return hashlib.sha256(json.dumps([tasks[0].json_key, pieces]).encode()).hexdigest()


def _check_places(request: Request) -> None:
    try:
        check_name(request.prefix)
    except ValueError as error:
        raise Refused(f"--out {str(request.prefix)[:200]!r}: {error}") from None
    check_writable("--out", request.prefix.parent)
    for place in request.places:
        if place.is_dir() and place.resolve() in (folder := request.prefix.parent.resolve(), *folder.parents):
            raise Refused(
                f"--out {request.prefix} lies in {place}, whose files are the texts, so the set would be among them "
                f"when it is built again; take a place beside it"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """`folder` there while something of it may be used again, and no second build at work in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            hold(lock)
        except BlockingIOError:
            raise Refused(
                f"another nsa-dist data build is at work in {folder}; wait for it, or take another --out"
            ) from None
        try:
            yield
        finally:
            if not any(folder.glob("*.json")):
                shutil.rmtree(folder, ignore_errors=True)  # nothing is finished in it
