"""Removing the run that a folder holds, so that another may start there: moved aside first, removed last.

    .replacing-ID/    the marker of run ID, and what was moved so far; from the marker's move on the folder holds no run
    .replaced-ID/     all of run ID, to be removed

Both are left behind by a crash, and the next start goes on where it ended. Only what the marker names is moved, links
as themselves. Other files in the run's folders stay where they are.
"""

import os
from pathlib import Path

from nsa_dist.train.files.marker import NAME, RunMarker, containers, found, remove
from nsa_dist.train.refused import Refused


def check_replaceable(folder: Path, marker: RunMarker) -> None:
    """ValueError if a folder of the run's is elsewhere: nothing is removed behind a link or on another file system."""
    for name in containers(marker.made):
        path = folder / name
        if path.is_symlink():
            raise Refused(
                f"{path} is a symbolic link to {path.resolve()}, and overwrite=true follows none, as what lies there "
                f"may be another's; remove the link and what it points to yourself, or take another output_dir"
            )
        if path.is_dir() and path.stat().st_dev != folder.stat().st_dev:
            raise Refused(
                f"{path} is on another file system than {folder}, so it cannot be moved aside at once before it is "
                f"removed; empty it yourself, or take another output_dir"
            )


def set_aside(folder: Path, marker: RunMarker) -> None:
    """Move the run of `marker` out of the way. A crash leaves either the run or one that is going."""
    check_replaceable(folder, marker)
    going = folder / f".replacing-{marker.run_id}"
    going.mkdir(exist_ok=True)
    os.rename(folder / NAME, going / NAME)
    finish_moving(folder)


def is_going(folder: Path) -> bool:
    """Whether a crash has left a run between its place and `.replaced-ID`."""
    return not os.path.lexists(folder / NAME) and bool(_asides(folder, ".replacing-"))


def finish_moving(folder: Path) -> None:
    """Take along what an interrupted `set_aside` left in place."""
    if os.path.lexists(folder / NAME):
        return  # of another run, whose files these are
    for going, marker in _asides(folder, ".replacing-"):
        for path in found(folder, marker.made):
            target = going / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)
        os.rename(going, folder / f".replaced-{marker.run_id}")


def remove_replaced(folder: Path) -> None:
    """Remove the runs that were set aside; the marker goes last, as it says whose they are."""
    for gone, _ in _asides(folder, ".replaced-"):
        for name in sorted(os.listdir(gone)):
            if name != NAME:
                remove(gone / name)
        remove(gone)


def _asides(folder: Path, prefix: str) -> list[tuple[Path, RunMarker]]:
    """Folders of this name that hold the marker of the run whose id they bear."""
    pairs = []
    for path in sorted(folder.glob(f"{prefix}*")):
        marker = None if path.is_symlink() else RunMarker.read(path)
        if marker is not None and path.name == f"{prefix}{marker.run_id}":
            pairs.append((path, marker))
    return pairs
