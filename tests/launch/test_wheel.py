"""What `pip install` of the wheel gives: every command's smallest form, from a folder that is no checkout."""

import json
import os
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import nsa_dist
from launch_cases import tiny_file
from nsa_launch import exit_codes

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "nsa_dist", "kernels", "launchers")
PACKAGES = ("nsa_dist", "nsa_kernels", "nsa_launch")
LEFTOVERS = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")  # of an editable installation


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy of the sources, by the setuptools that is here: no index is asked."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "sources" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFTOVERS)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "sources"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's packages; what they depend on is this environment's."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--target", str(folder), str(wheel))
    return folder


@pytest.fixture
def nsa(site, tmp_path):
    """The installed command with these words, run in `tmp_path`; what it printed."""

    def run(*words: str, code: int = exit_codes.OK) -> str:
        return call([site / "bin" / "nsa-dist", *words], site, tmp_path, code)

    return run


def pip(command: str, *words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--no-deps", "--no-index", "--quiet", *words],
        check=True,
        env=environment(),
    )


def call(command: list, site: Path, folder: Path, code: int) -> str:
    """stdout and stderr; the exit code must be `code`."""
    env = environment() | {"PYTHONPATH": str(site), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert ended.returncode == code, ended.stdout
    return ended.stdout


def environment() -> dict[str, str]:
    """Ours without what would lead to the checkout, to a cluster, or to another mode of the kernels."""
    left_out = ("PYTHONPATH", "RAY_ADDRESS", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if name not in left_out}


def test_it_says_what_it_is(wheel):
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_string(archive.read(metadata).decode())
    assert fields["Version"] == nsa_dist.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)


def test_the_packages_are_the_wheels(site, tmp_path):
    """Every module that the checkout has, and none of the checkout's."""
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{package}.__file__' for package in PACKAGES)})"
    found = call([sys.executable, "-c", code], site, tmp_path, 0).split()
    assert found == [str(site / package / "__init__.py") for package in PACKAGES]
    for package, root in zip(PACKAGES, (".", "kernels", "launchers"), strict=True):
        ours = {path.relative_to(ROOT / root) for path in (ROOT / root / package).rglob("*.py")}
        assert ours == {path.relative_to(site) for path in (site / package).rglob("*.py")}


def test_version_and_help(nsa):
    assert nsa("--version") == f"nsa-dist {nsa_dist.__version__}\n"
    assert "train" in nsa("--help")
    assert "--compare" in nsa("bench", "kernels", "--help")


def test_a_configuration_is_printed_and_planned(nsa, tmp_path):
    """From nothing: the defaults, written to a file here, and the plan of that file."""
    (tmp_path / "mine.yaml").write_text(nsa("config", "output_dir=runs/mine", "context_parallel_size=2"))
    said = nsa("plan", "mine.yaml", "--json", "plan.json")
    assert said.startswith("Fits 8 x H200")
    assert (tmp_path / "plan.json").exists()


def test_doctor(nsa):
    assert "ready" in nsa("doctor")


def test_bench_cp(nsa, tmp_path):
    words = ["--device", "cpu", "--tokens", "1024", "--cp", "2", "--only", "fetch u=1", "--repeats", "0"]
    assert "fetch u=1" in nsa("bench", "cp", "--out", "cp", "--no-memory-curve", *words)
    shares = json.loads((tmp_path / "cp" / "cp.json").read_text())["shares"]
    assert shares
    assert not [share for share in shares if "error" in share]


def test_bench_kernels(nsa, tmp_path):
    """On a GPU the smallest case; without one the refusal."""
    words = ["bench", "kernels", "--out", "kernels", "--preset", "smoke"]
    if torch.cuda.is_available():
        nsa(*words)
        assert (tmp_path / "kernels" / "bench.json").exists()
    else:
        assert "needs a CUDA device" in nsa(*words, code=exit_codes.BAD_CONFIG)


SHORT = ("steps=2", "warmup_steps=1", "context_parallel_size=1")


@pytest.mark.slow
def test_training_through_torchrun(site, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    call([*launcher, "-m", "nsa_launch.torchrun", str(tiny_file(tmp_path)), *SHORT], site, tmp_path, exit_codes.OK)
    assert (tmp_path / "run" / "latest.json").exists()


@pytest.mark.slow
def test_train(nsa, tmp_path):
    nsa("train", str(tiny_file(tmp_path)), *SHORT)
    assert (tmp_path / "run" / "latest.json").exists()
