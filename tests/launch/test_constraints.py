"""constraints.txt, which `make` installs from: one version of all that pyproject.toml asks for, within its ranges."""

import importlib.util
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYTHONS = ["3.11", "3.12", "3.13"]


def asked_for() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        if (requirement := Requirement(text)).name != "nsa-dist":
            yield requirement


def pinned(python: str) -> dict[str, str]:
    """{package: version} for a Python; a package given twice fails."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    holding = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"python_version": python})]
    pins = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in holding}
    assert len(pins) == len(holding)
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_asked_for_is_pinned_within_its_range(python):
    pins = pinned(python)
    for requirement in asked_for():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_oldest_and_the_newest_python_have_megatrons_of_their_own():
    versions = [pinned(python)["megatron-core"] for python in PYTHONS]
    assert versions[0].startswith("0.16.")
    assert versions[-1].startswith("0.19.")


def test_users_get_ranges():
    assert all("==" not in str(r.specifier) or "*" in str(r.specifier) for r in asked_for())


def test_environments_are_merged_into_lines_with_markers():
    spec = importlib.util.spec_from_file_location("constraints", ROOT / ".ci/constraints.py")
    merge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(merge)
    pythons = [(3, 11), (3, 12), (3, 13)]
    lines = {tuple(found): merge._lines("a", pythons, list(found)) for found in ("111", "122", "123", (None, "2", "2"))}
    assert list(lines.values()) == [
        ["a==1"],
        ['a==1; python_version < "3.12"', 'a==2; python_version >= "3.12"'],
        [
            'a==1; python_version < "3.12"',
            'a==2; python_version >= "3.12" and python_version < "3.13"',
            'a==3; python_version >= "3.13"',
        ],
        ["a==2"],
    ]
