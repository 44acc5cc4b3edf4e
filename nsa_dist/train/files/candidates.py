"""Which checkpoints of a run may be the one to go on from: judged by names and sizes, newest first.

The step folders decide. `latest.json` is the quick answer for people and other programs; where it disagrees, that is
said. A folder without a manifest that is newer than `latest.json` is what an interrupted save left: no checkpoint yet.

A run whose checkpoints were all made by a version without manifests goes by `latest.json` alone, as it did there, and
its checkpoint is loaded unverified, which is said. From its first checkpoint with a manifest on, none counts without.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from nsa_dist.train.files.manifest import NAME, DamagedError, Manifest, wrong_at_sight
from nsa_dist.train.files.marker import RunMarker

ANY_CHECKPOINT = "checkpoints/step_" + 8 * "[0-9]"
LATEST = "latest.json"
_ELSE = "or start a new run in another output_dir (in this one: overwrite=true)"


class Latest(NamedTuple):
    """What `latest.json` says, or what is wrong with it."""

    step: int = 0
    wrong: str = ""


class Damaged(NamedTuple):
    """A checkpoint that was complete and is not as it was written."""

    step: int
    wrong: str  # files and what is wrong with them

    @property
    def line(self) -> str:
        return f"{name_of(self.step)}: {self.wrong}"


@dataclass(frozen=True)
class Candidates:
    """What a look at the folder finds; steps, newest first."""

    latest: Latest | None  # no file: None
    whole: tuple[int, ...]  # as far as names and sizes say
    damaged: tuple[Damaged, ...]
    torn: tuple[int, ...]  # begun and not completed, as far as anything tells
    has_manifests: bool

    @property
    def newest(self) -> int:
        """The step of the newest that may be loaded; 0: none."""
        return self.whole[0] if self.whole else 0


def name_of(step: int) -> str:
    """Below the run's folder."""
    return f"checkpoints/step_{step:08d}"


def look(root: Path, marker: RunMarker) -> Candidates:
    """The checkpoints that `marker`'s run made in `root` and that are there."""
    latest = _read_latest(root)
    if not marker.manifests:
        return _without_manifests(root, marker, latest)
    whole, damaged, torn = [], _not_listed(root, marker, latest), []
    for step in steps_of(marker.made):
        wrong = _wrong(root, marker, 0 if latest is None else latest.step, step)
        if wrong is None:
            torn.append(step)
        elif wrong:
            damaged.append(Damaged(step, "; ".join(wrong)))
        elif os.path.lexists(root / name_of(step)):
            whole.append(step)
    if torn and not (whole or damaged) and not any((root / name_of(step)).is_dir() for step in torn):
        damaged.append(
            Damaged(torn.pop(0), "its folder is missing")
        )  # there were complete ones, as there are manifests
    return Candidates(latest, tuple(whole), tuple(damaged), tuple(torn), True)


def steps_of(made: Sequence[str]) -> list[int]:
    """The steps whose folders are among the names `made`, newest first."""
    return sorted((int(name[-8:]) for name in made if fnmatchcase(name, ANY_CHECKPOINT)), reverse=True)


def about_latest(seen: Candidates, step: int) -> list[str]:
    """What is to be said of `latest.json` where the run goes on from `step` as the folders say; [] if it agrees."""
    if seen.latest is None:
        return [f"{LATEST} is missing; the folders say that step {step} is the newest checkpoint"] if step else []
    if seen.latest.wrong:
        return [f"{LATEST} {seen.latest.wrong}; the folders say that step {step} is the newest checkpoint"]
    if seen.latest.step < step:
        return [f"{LATEST} names step {seen.latest.step}, and the checkpoint of step {step} is newer and complete"]
    return []


def not_complete(step: int) -> str:
    """What is to be said of a torn checkpoint."""
    return f"{name_of(step)} is not complete (it has no {NAME})"


def refusal(root: Path, seen: Candidates, damaged: Sequence[Damaged]) -> str:
    """Why there is nothing to go on from, although there should be; "" for a run that has no checkpoint yet."""
    latest = seen.latest
    if not damaged:
        if latest is None:
            return ""
        if not seen.has_manifests:
            return _refusal_without_manifests(root, latest)
    lines = [each.line for each in damaged]
    lines += [f"{LATEST} {latest.wrong}"] if latest is not None and latest.wrong else []
    lines += [not_complete(step) for step in seen.torn]
    shown = "\n".join(f"  {line}" for line in lines)
    return (
        f"no checkpoint of the run in output_dir={root} is as it was written, so there is nothing to go on from:\n"
        f"{shown}\nput these files back from a copy, {_ELSE}"
    )


def _refusal_without_manifests(root: Path, latest: Latest) -> str:
    path = root / LATEST
    if latest.wrong:
        example = json.dumps({"step": 4, "checkpoint": name_of(4)})
        return (
            f"{path} {latest.wrong}, and no manifest tells which checkpoint of this run is whole; write the newest one "
            f"into it, as {example}, {_ELSE}"
        )
    return (
        f"{path} names {root / name_of(latest.step)}, which is not there, so there is nothing to go on from; put it "
        f"back, or write the newest checkpoint that is left into {path}"
    )


def _not_listed(root: Path, marker: RunMarker, latest: Latest | None) -> list[Damaged]:
    """What `latest.json` names, if the marker does not."""
    if latest is None or latest.wrong or latest.step in steps_of(marker.made):
        return []
    there = os.path.lexists(root / name_of(latest.step))
    return [Damaged(latest.step, "run.json does not say that this run made it" if there else "its folder is missing")]


def _wrong(root: Path, marker: RunMarker, latest_step: int, step: int) -> list[str] | None:
    """What names and sizes show to be wrong with a checkpoint. None: not complete, as an interrupted save leaves it."""
    folder, was_complete = root / name_of(step), step <= latest_step
    if not os.path.lexists(folder):
        if f"{name_of(step)}.damaged" in marker.made:
            return []  # set aside earlier
        return ["its folder is missing"] if was_complete else None
    try:
        manifest = Manifest.read(folder)
    except DamagedError as error:
        return [str(error)]
    if manifest is None:
        return [f"{NAME} is missing"] if was_complete else None
    return wrong_at_sight(manifest, folder, marker.run_id, step)


def _without_manifests(root: Path, marker: RunMarker, latest: Latest | None) -> Candidates:
    step = latest.step if latest is not None and not latest.wrong else 0
    whole = (step,) if step and (root / name_of(step)).is_dir() else ()
    torn = [s for s in steps_of(marker.made) if latest is None and os.path.lexists(root / name_of(s))]
    return Candidates(latest, whole, (), tuple(torn), False)


def _read_latest(root: Path) -> Latest | None:
    path = root / LATEST
    if not os.path.lexists(path):
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return Latest(wrong=f"cannot be read ({type(error).__name__}: {error})")
    if not isinstance(raw, dict) or type(raw.get("step")) is not int or type(raw.get("checkpoint")) is not str:
        return Latest(wrong="does not say both step and checkpoint")
    if raw["step"] < 1 or raw["checkpoint"] != name_of(raw["step"]):
        return Latest(wrong=f"names {raw['checkpoint']!r} for step {raw['step']}, which is no checkpoint of this run")
    return Latest(raw["step"])
