"""What the docs site makes from sources, and the links of what it does not hold. `make docs` builds all of it."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from code_blocks import OTHER_PAGES, ROOT, pages
from nsa_kernels import reference
from nsa_launch.config import RunConfig

LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", ROOT / f"docs/site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", RunConfig.model_fields)
def test_every_key_has_a_row(name):
    text = section(load("configuration").tables(), name)
    model = RunConfig.model_fields[name].annotation
    assert issubclass(model, BaseModel)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| `")]
    assert rows == [f"`{key}`" for key in model.model_fields]


def test_types_and_defaults_are_words():
    run = section(load("configuration").tables(), "run")
    assert "| `steps` | integer, at least 1 | `300` |" in run
    assert '| `dtype` | `fp32`, `bf16` | `"fp32"` |' in run
    assert "| `output_dir` | path | required |" in run
    launch = section(load("configuration").tables(), "launch")
    assert "| `env` | mapping of text to text, or null | `{}` |" in launch
    assert "| `processes_per_node` | integer, or null, at least 1 | `null` |" in launch


def test_every_command_has_its_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = load("command_line").sections()
    for command in ("train", "plan", "bench", "bench cp", "doctor"):
        assert f"usage: nsa-dist {command}" in section(text, f"nsa-dist {command}")
    assert "nsa_launch.torchrun CONFIG.yaml" in section(text, "torchrun")


@pytest.fixture
def beside(monkeypatch):
    """The modules of the site find each other, and griffe, as they do when MkDocs loads them."""
    pytest.importorskip("griffe", reason="make docs needs it, too: pip install '.[docs]'")
    monkeypatch.syspath_prepend(ROOT / "docs/site")


def test_every_kernel_is_called_as_it_is(beside):
    text = load("kernel_functions").functions()
    for name in reference.__all__:
        function = getattr(reference, name)
        entry = text.split(f"### {name}\n")[1].split("\n### ")[0]
        assert all(f"{parameter}: " in entry for parameter in inspect.signature(function).parameters)
        assert inspect.getdoc(function).split("\n")[0].split("`")[0].split("*")[0] in entry


def test_columns_of_docstrings_stay_columns(beside):
    markdown = load("docstrings").markdown
    assert markdown("a * b\n\nx    [T]   tokens\n     more") == "a \\* b\n\n```text\nx    [T]   tokens\n     more\n```"
    assert markdown("words `a * b` words") == "words `a * b` words"


@pytest.mark.parametrize("page", [*OTHER_PAGES, "CHANGELOG.md", "DECISIONS.md"])
def test_links_lead_somewhere(page):
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_links_of_the_docs_lead_somewhere():
    """In the repository as well as on the site, where a warning of MkDocs would say so."""
    for page in [*pages(), *Path(ROOT, "docs/decisions").glob("*.md")]:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            assert page.parent.joinpath(link).exists(), f"{page.relative_to(ROOT)} links to {link}"
