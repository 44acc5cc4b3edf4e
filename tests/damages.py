"""Damages of a run's checkpoints, drawn by seed, and what should come of them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from nsa_dist.train.files.candidates import name_of

PAGE = 4096


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def flip_bit(path: Path, draw: random.Random) -> None:
    text = bytearray(path.read_bytes())
    text[draw.randrange(len(text))] ^= 1 << draw.randrange(8)
    path.write_bytes(text)


def zero_page(path: Path, draw: random.Random) -> None:
    text = bytearray(path.read_bytes())
    start = PAGE * draw.randrange(-(-len(text) // PAGE))
    text[start : start + PAGE] = bytes(len(text[start : start + PAGE]))
    path.write_bytes(text)


def cut(path: Path, draw: random.Random) -> None:
    text = path.read_bytes()
    path.write_bytes(text[: draw.randrange(len(text))])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(1 + draw.randrange(PAGE)))


def lose(path: Path, draw: random.Random) -> None:
    path.unlink()


OF_A_FILE: list[Callable[[Path, random.Random], None]] = [flip_bit, zero_page, cut, lengthen, lose]


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("swapped")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def some_damage(run: Path, draw: random.Random) -> str:
    """Does one damage to the folder `run` and says which; "" if no checkpoint is left to damage."""
    folders = [path for path in sorted((run / "checkpoints").iterdir()) if any(path.iterdir())]
    if not folders:
        return ""
    folder = draw.choice([*folders, folders[-1]])  # the newest more often
    path = draw.choice(sorted(folder.iterdir()))
    kind = draw.choice(["file", "file", "file", "swapped files", "swapped folders", "folder", "latest.json", "more"])
    if kind == "file":
        damage = draw.choice(OF_A_FILE)
        damage(path, draw)
        return f"{damage.__name__} {folder.name}/{path.name}"
    if kind == "swapped files":
        other = draw.choice([each for each in folders if each != folder] or [folder])
        if (other / path.name).exists() and other != folder:
            swap(path, other / path.name)
    elif kind == "swapped folders" and len(folders) > 1:
        swap(*draw.sample(folders, 2))
    elif kind == "folder":
        shutil.rmtree(folder)
    elif kind == "latest.json" and (run / kind).exists():
        damage_latest(run / kind, draw)
    elif kind == "more":
        (folder / "more").write_bytes(draw.randbytes(100))
    return f"{kind} {folder.name}/{path.name}"


def damage_latest(path: Path, draw: random.Random) -> None:
    stale = json.dumps({"step": 2, "checkpoint": name_of(2)})
    texts = [stale, '{"step": 6}', "[]", "[" * 100_000, '{"step": 6, "checkpoint": "../elsewhere"}', "null"]
    draw.choice([lambda: path.write_text(draw.choice(texts)), lambda: cut(path, draw), lambda: flip_bit(path, draw)])()


def some_damage_of_another_file(run: Path, draw: random.Random) -> str:
    """Does one damage to a file of the run that is in no checkpoint, which a bit at a time may be, and says which."""
    others = [
        "run.json",
        "run.json",
        "metrics.jsonl",
        *(f"data/{path.name}" for path in sorted((run / "data").iterdir())),
    ]
    path = run / draw.choice([name for name in others if (run / name).exists()])
    damage = draw.choice(OF_A_FILE)
    damage(path, draw)
    return f"{damage.__name__} {path.relative_to(run)}"


def unhurt(run: Path, before: dict[int, dict[str, bytes]]) -> list[int]:
    """The steps whose checkpoints hold what they held, newest first; more files than before hurt nobody."""
    return [
        step
        for step, files in sorted(before.items(), reverse=True)
        if (run / name_of(step)).is_dir() and files.items() <= contents(run / name_of(step)).items()
    ]
