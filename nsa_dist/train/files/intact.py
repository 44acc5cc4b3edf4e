"""The newest checkpoint that is as it was written: found before anything of it is loaded, by all ranks together.

Each rank reads a share of the files and compares digests; all see all that is wrong. The first checkpoint of which
nothing is wrong is taken, newest first. Damaged ones that are newer are set aside under another name, once one is found
that is not: a run that cannot go on is left as it is.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsa_dist.train.files.candidates import Damaged, about_latest, name_of, not_complete, refusal
from nsa_dist.train.files.manifest import ALWAYS_THERE, NAME, DamagedError, Manifest, wrong_in_content
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.refused import Refused
from nsa_dist.train.world import World


@dataclass(frozen=True)
class Intact:
    """Where a run goes on; the same on every process, but for the seconds."""

    path: Path | None = None  # None: at step 0
    notices: tuple[str, ...] = ()  # what people should read: what is damaged, and what is done about it
    num_bytes: int = 0  # that were read and compared, by all ranks together
    seconds: float = 0.0

    def record(self) -> dict[str, object]:
        """Its part of the "start" record."""
        return {
            "checkpoint": None if self.path is None else self.path.name,
            "verified_bytes": self.num_bytes,
            "verified_s": self.seconds,
            "notices": list(self.notices),
        }


def newest_intact(output: OutputDir, world: World) -> Intact:
    """The checkpoint to go on from. Every process calls it. Refused if there should be one and none is intact."""
    started = time.perf_counter()
    steps, has_manifests = world.agreed(lambda: _steps(output))
    if not has_manifests:
        return _unverified(output, world)
    found, num_bytes, damaged = 0, 0, list[Damaged]()
    for step in steps:
        manifest = _manifest(output, step, world)
        wrong = _wrong(output.checkpoint(step), manifest, world)
        num_bytes += 0 if manifest is None else manifest.num_bytes
        if not wrong:
            found = step
            break
        damaged.append(Damaged(step, "; ".join(wrong)))
    notices = world.agreed(lambda: _settle(output, found, damaged))
    path = output.checkpoint(found) if found else None
    return Intact(path, tuple(notices), num_bytes, time.perf_counter() - started)


def _steps(output: OutputDir) -> tuple[list[int], bool]:
    seen = output.candidates()
    return list(seen.whole), seen.has_manifests


def _manifest(output: OutputDir, step: int, world: World) -> Manifest | None:
    """As this process reads it; None if it is not the one that process 0 reads."""
    try:
        mine = Manifest.read(output.checkpoint(step))
    except DamagedError:
        mine = None
    digests = world.gathered(None if mine is None else mine.digest)
    return mine if set(digests) == {digests[0]} else None


def _wrong(folder: Path, manifest: Manifest | None, world: World) -> list[str]:
    """What is wrong with the files, in the eyes of the ranks that read them; the largest are shared out first."""
    if manifest is None:
        return [f"{NAME} does not read the same on every rank"]
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    mine = wrong_in_content(manifest, folder, names[world.rank :: world.size])
    return sorted(text for texts in world.gathered(mine) for text in texts)


def _settle(output: OutputDir, found: int, read: Sequence[Damaged]) -> list[str]:
    """Set aside what is damaged and newer than the step `found`, and say so. Refused if there is nothing else."""
    seen = output.candidates()
    damaged = sorted([*read, *seen.damaged], key=lambda each: -each.step)
    nothing = "" if found else refusal(output.root, seen, damaged)
    if nothing:
        raise Refused(nothing)
    lines = about_latest(seen, found)
    lines += [f"{not_complete(step)}, and is passed over" for step in seen.torn if step > found]
    for each in damaged:
        if each.step > found:
            aside = output.set_aside(each)
            kept = f", and is kept as {aside}" if aside else ""
            lines.append(f"{name_of(each.step)} is damaged ({each.wrong}){kept}; the run goes on from step {found}")
    if found and (seen.latest is None or seen.latest.step != found):
        output.set_latest(found)
    return lines


def _unverified(output: OutputDir, world: World) -> Intact:
    """The checkpoint of a run that has no manifests: of an earlier version, or it has none yet."""
    step, notices = world.agreed(lambda: _settle_unverified(output))
    return Intact(output.checkpoint(step) if step else None, tuple(notices))


def _settle_unverified(output: OutputDir) -> tuple[int, list[str]]:
    seen = output.candidates()
    step, lines = seen.newest, [f"{not_complete(step)}, and is passed over" for step in seen.torn]
    if not step:
        nothing = refusal(output.root, seen, ())
        if nothing:
            raise Refused(nothing)
        return 0, lines
    missing = [name for name in ALWAYS_THERE if not (output.checkpoint(step) / name).is_file()]
    if missing:
        raise Refused(refusal(output.root, seen, [Damaged(step, f"{' and '.join(missing)} missing")]))
    return step, [
        f"{name_of(step)} is of a version that wrote no {NAME}, so nothing tells whether its files are as they were "
        f"written: it is loaded all the same, and the next checkpoint will have one"
    ]
