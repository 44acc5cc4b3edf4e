"""One constraints file out of what several environments hold, each of another Python: `make constraints`.

python .ci/constraints.py VENV [VENV ...] > constraints.txt
"""

import re
import subprocess
import sys

# Each torch asks for its own, by exact versions; and tools that a virtual environment brings along.
LEFT_OUT = re.compile(r"(nvidia|cuda)-.*|pip|wheel")
HEAD = """\
# What `make` installs, so that an installation repeats. Users of the package get the ranges of pyproject.toml.
# Written by `make constraints` (.ci/constraints.py) from environments of Python {}; do not edit.
"""


def main(venvs: list[str]) -> None:
    pythons = sorted((_python(venv), venv) for venv in venvs)
    versions = [version for version, _ in pythons]
    held = [_freeze(venv) for _, venv in pythons]
    print(HEAD.format(", ".join(".".join(map(str, version)) for version in versions)), end="")
    for name in sorted(set().union(*held)):
        for line in _lines(name, versions, [packages.get(name) for packages in held]):
            print(line)


def _python(venv: str) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    major, minor = subprocess.check_output([f"{venv}/bin/python", "-c", code], text=True).split()
    return int(major), int(minor)


def _freeze(venv: str) -> dict[str, str]:
    """{package: version}, without the part that says which build of a version it is."""
    command = [f"{venv}/bin/python", "-m", "pip", "freeze", "--all", "--exclude-editable"]
    pairs = (line.split("==") for line in subprocess.check_output(command, text=True).splitlines() if "==" in line)
    return {name.lower(): version.partition("+")[0] for name, version in pairs if not LEFT_OUT.fullmatch(name.lower())}


def _lines(name: str, pythons: list[tuple[int, int]], found: list[str | None]) -> list[str]:
    """One line where all environments have the same version, or a line for each run of Pythons that do."""
    known = [(python, version) for python, version in zip(pythons, found, strict=True) if version is not None]
    starts = [i for i, (_, version) in enumerate(known) if i == 0 or version != known[i - 1][1]]
    lines = []
    for i, following in zip(starts, [*starts[1:], None], strict=True):
        marks = [f'python_version >= "{_text(known[i][0])}"'] if i else []
        marks += [f'python_version < "{_text(known[following][0])}"'] if following is not None else []
        lines.append(f"{name}=={known[i][1]}" + (f"; {' and '.join(marks)}" if marks else ""))
    return lines


def _text(python: tuple[int, int]) -> str:
    return ".".join(map(str, python))


if __name__ == "__main__":
    main(sys.argv[1:])
