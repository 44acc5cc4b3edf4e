"""The code blocks of README.md and docs, found in the Markdown: what runs, what is checked, what is output.

```python   runs; the blocks of a page one after the other, as one program in a process of its own. A page with
            `<!-- python blocks run on 2 processes -->` runs on so many, as torchrun would start them
```bash     runs: each line is a command that exits with 0
```sh       does not run, for it takes minutes or a cluster: what can be checked of each command is
```text     is output, a formula or a drawing
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHER_PAGES = ("README.md", "CONTRIBUTING.md", "kernels/README.md", "launchers/README.md")
MARKS = ("python", "bash", "sh", "text")
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)\n(?P<code>.*?)^ *(?P=fence) *$", re.M | re.S)
PROCESSES = re.compile(r"<!-- python blocks run on (\d+) processes -->")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int  # of its first line of code, from 1
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """The lines of a block of shell, continued ones in one, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pages() -> list[Path]:
    """Whatever is written for readers, but for what was decided when: that tells of code as it was."""
    decisions = ROOT / "docs/decisions"
    documents = [page for page in sorted(ROOT.glob("docs/**/*.md")) if decisions not in page.parents]
    return [*(ROOT / name for name in OTHER_PAGES), *documents]


def blocks(page: Path) -> list[Block]:
    """In the order of the page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("code")) + 1, found["info"].strip(), found["code"])
        for found in FENCE.finditer(text)
    ]


def all_blocks(mark: str) -> Iterator[Block]:
    """Of all pages."""
    return (block for page in pages() for block in blocks(page) if block.mark == mark)


def program(page: Path) -> str:
    """The Python of a page, each line where it stands there, so that an error names the page's own line."""
    lines: list[str] = []
    for block in blocks(page):
        if block.mark == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


def num_processes(page: Path) -> int:
    """How many the page's Python wants."""
    found = PROCESSES.search(page.read_text(encoding="utf-8"))
    return int(found[1]) if found else 1
