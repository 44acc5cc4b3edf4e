"""The folders that a configuration names: whether their names can be names, and whether a run may write there."""

import os
import re
import stat
from pathlib import Path

from nsa_dist.train.refused import Refused

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux
_BELOW = 255  # of a path, left for the names of what a run writes below it
_VARIABLE = re.compile(r"\$(\w+|\{)")


def check_name(path: str | Path) -> None:
    """ValueError for what no folder can be called, or nobody means to call one."""
    text = str(path)
    if not text.strip():
        raise ValueError("it is empty, which would be the folder one happens to be in; name a folder, or . for that")
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not UTF-8, and the run's files could not name it; rename that folder") from None
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"{text!r} has control characters, which no log could show; name another folder")
    if _VARIABLE.search(text):
        raise ValueError(
            f"{text!r} has a variable that no shell has replaced, and files have none; write out what it stands for, "
            f'or give it on the command line as key="$NAME/..." for the shell'
        )
    longest = max(map(len, raw.split(b"/")))
    if longest > _LONGEST_NAME or len(raw) > _LONGEST_PATH - _BELOW:
        raise ValueError(
            f"{text[:40]!r}... has {len(raw)} bytes, {longest} between two slashes, and file systems take "
            f"{_LONGEST_NAME} between slashes, {_LONGEST_PATH} with the names below it; take a shorter one"
        )


def expanded(key: str, path: Path) -> Path:
    """`path` absolute, with ~ and ~user replaced. Refused where there is no such user or no such place."""
    try:
        return path.expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise Refused(f"{key}={path} cannot be made absolute ({error}); write the whole path out") from None


def is_folder(path: Path) -> bool:
    """False for what cannot be looked at, too."""
    try:
        return path.is_dir()
    except OSError:
        return False


def check_writable(key: str, path: Path) -> None:
    """Refused unless `path` is a folder that can be written to, or could be made one. Nothing is made."""
    for place in (path, *path.parents):
        try:
            is_a_folder = stat.S_ISDIR(place.stat().st_mode)
        except FileNotFoundError:
            if place.is_symlink():
                raise Refused(
                    f"{key}={path}: {place} is a symbolic link to nowhere, and a run needs a folder for its files; "
                    f"name another one"
                ) from None
            continue  # it would be made
        except NotADirectoryError:
            continue  # a parent is the file
        except OSError as error:
            raise Refused(f"{key}={path} cannot be used ({error.strerror}); name another one") from None
        if not is_a_folder and place == path:
            raise Refused(f"{key}={path} is not a folder, and a run needs a folder for its files; name another one")
        if not is_a_folder:
            raise Refused(
                f"{key}={path} cannot be used: it lies below {place}, which is not a folder; name a folder that can be "
                f"written to"
            )
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise Refused(
                f"{key}={path} cannot be written to: {place} is read-only, or not ours; name a folder that can be "
                f"written to"
            )
        return
