"""The Gluon kernels, which the interpreter does not know, compile for Hopper GPUs with the triton that is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("which", ["", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_gluon_kernel_compiles(tmp_path, which):
    package = ROOT / "kernels" / "nsa_kernels"
    sources = {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text() for path in package.rglob("*.py")
    }
    kernels = {
        f"{name}.{kernel}"
        for name, text in sources.items()
        for kernel in re.findall(r"@gluon\.jit(?:\([^()]*\))?[^\n]*\ndef (\w+_kernel)\(", text)
    }
    assert len(kernels) >= 7
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hopper_compile.py")), *which.split()],
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(run.stdout.split()) == kernels
