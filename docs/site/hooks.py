"""What MkDocs calls while it builds the site: generated parts, and a page of every source file that a page links to.

A page says `<!-- generated: configuration -->` where a part of it is made from the sources. Markdown under docs/ links
to files of the repository as they lie (`../../configs/tiny-cpu.yaml`), which a reader of the repository can follow.
Here such a link goes to a page of the site that shows the file.
"""

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), *(str(ROOT / root) for root in (".", "kernels", "launchers"))]

import command_line  # noqa: E402
import configuration  # noqa: E402
import kernel_functions  # noqa: E402

SOURCES = "source"  # folder of the site with the pages of source files
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(#[^)\s]*)?(?=\))")
GENERATED = re.compile(r"<!-- generated: (\w+) -->")
PARTS = {
    "configuration": configuration.tables,
    "command_line": command_line.sections,
    "kernels": kernel_functions.functions,
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash", ".sh": "bash", ".toml": "toml"}
DECISION = re.compile(r"^- \S+ \[(.+?)\]\((\S+?\.md)\)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The decisions come in the order of their index."""
    (decisions,) = (entry for entry in config.nav if "Decisions" in entry)
    index = Path(config.docs_dir, "decisions/README.md").read_text(encoding="utf-8")
    decisions["Decisions"] += [{title: f"decisions/{page}"} for title, page in DECISION.findall(index)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every source file that a page links to, and for those that such a page links to."""
    waiting, seen = list(files.documentation_pages()), set()
    while waiting:
        page = waiting.pop()
        for source in sorted(_sources_of(page) - seen):
            seen.add(source)
            if source.startswith("docs/"):
                continue
            shown = File.generated(
                config, _page_of(source), content=_shown(source), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(shown)
            waiting.append(shown)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """What is generated comes to its place; links to files of the repository become links to their pages."""
    markdown = GENERATED.sub(lambda match: PARTS[match[1]](), markdown)
    here = PurePosixPath(page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        source = _source(page.file.src_uri, match[1])
        return match[0] if source is None else relpath(_page_of(source), here) + (match[2] or "")

    return LINK.sub(replaced, markdown)


def _sources_of(page: File) -> set[str]:
    found = (_source(page.src_uri, match[1]) for match in LINK.finditer(page.content_string))
    return {source for source in found if source is not None}


def _source(src_uri: str, link: str) -> str | None:
    """Path in the repository of what a page links to; None for other pages, and for what is not there.

    MkDocs warns about the latter: such a link then leads nowhere.
    """
    home = PurePosixPath(src_uri)
    if home.parts[0] == SOURCES:  # it shows a file, whose links start where the file lies
        target = normpath(PurePosixPath(*home.parts[1:]).parent / link)
    else:
        target = normpath(PurePosixPath("docs", src_uri).parent / link)
    is_page = PurePosixPath(target).parts[0] == "docs" and home.parts[0] != SOURCES
    return None if is_page or not (ROOT / target).is_file() else target


def _page_of(source: str) -> str:
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"{SOURCES}/{source}" if source.endswith(".md") else f"{SOURCES}/{source}.md"


def _shown(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith(".md"):
        return text
    return f"# `{source}`\n\n````{LANGUAGES.get(Path(source).suffix, 'text')}\n{text.rstrip()}\n````\n"
