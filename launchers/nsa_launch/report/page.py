"""The page: what `sections` say, one below the other, in a file that needs no network."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from nsa_dist import __version__
from nsa_dist.train.files.atomic import write_atomically
from nsa_dist.train.files.lock import lock as hold
from nsa_dist.train.files.marker import RunMarker
from nsa_dist.train.refused import Refused
from nsa_launch.report import attention, sections, tasks
from nsa_launch.report.facts import Facts, read
from nsa_launch.run_folder import RunFolder

_SECTIONS = (
    ("Summary", sections.summary),
    ("Losses", sections.losses),
    ("Tasks", tasks.tasks),
    ("Throughput", sections.speed),
    ("Memory", sections.memory),
    ("Traffic", attention.traffic),
    ("Selection", attention.selection),
    ("Health", sections.health),
    ("Launches and failures", sections.events),
    ("Configuration", sections.settings),
    ("Versions", sections.versions),
    ("Where everything is", sections.places),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
h1 { font-size: 1.5rem } h2 { border-bottom: 1px solid #d5dce4; margin-top: 2.2rem; font-size: 1.2rem }
h3 { font-size: 1rem } img { max-width: 100%; height: auto; display: block; margin: .5rem 0 }
table { border-collapse: collapse; margin: .5rem 0 } td, th { border: 1px solid #d5dce4; padding: .2rem .6rem; text-align: left; vertical-align: top; overflow-wrap: break-word }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto } .note { color: #5b6b7b }
"""  # noqa: E501


def write(folder: RunFolder, out: Path | None = None) -> Path:
    """Write the report of the run in `folder`, as `report.html` there or as `out`; where it is.

    Refused where there is no run, or where `report.html` is a file that the run did not make.
    """
    facts = read(folder)
    if out is None:
        _claim_name(folder, facts.marker)
    path = out or folder.report
    write_atomically(path, of(facts))
    return path


def of(facts: Facts) -> str:
    """The whole page."""
    name = escape(str(facts.folder.path))
    parts = [(title, _made(section, facts)) for title, section in _SECTIONS]
    shown = "\n".join(f"<section><h2>{title}</h2>\n{text}</section>" for title, text in parts if text)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(facts.folder.path.name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{name}</h1>\n"
        f'<p class="note">Written {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC by nsa-dist {__version__}.</p>\n'
        f"{shown}\n</body></html>\n"
    )


def _made(section: Callable[[Facts], str], facts: Facts) -> str:
    """A spoiled record takes its own section away, and no other."""
    try:
        return section(facts)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return f"<p>What is recorded for this is spoiled ({escape(type(error).__name__)}: {escape(str(error))}).</p>"


def _claim_name(folder: RunFolder, marker: RunMarker) -> None:
    """The marker names `report.html`, so that a new run in its place may remove it; earlier versions' do not yet.

    A run that is at work writes its marker itself, and has the name in it if this version started it.
    """
    name = folder.report.name
    if name in marker.made:
        return
    if os.path.lexists(folder.report):
        raise Refused(
            f"{folder.report} is there, and the run did not make it, so it is not overwritten; move it away, or name "
            f"another file with --out"
        )
    with (folder.path / ".lock").open("a") as lock:
        try:
            hold(lock)
        except BlockingIOError:
            raise Refused(
                f"a launch of an earlier version is at work in {folder.path}, and its run.json does not know of "
                f"{name}; name another file with --out"
            ) from None
        current = RunMarker.read(folder.path) or marker
        current.changed(made=(*current.made, name)).write(folder.path)
