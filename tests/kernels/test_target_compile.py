"""The plain kernels compile for GPUs that are not here, and fit their shared memory with the tiles they pick there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ROOMS = ("gates", "interval", "phi", "selected", "selection")  # of training; decoding's and ranks' kernels are not here
# Of the wide cases, 256 / 256 with 64 heads to a key-value head; on gfx942 items of 192 / 128 with one, too. They are
# still to be given smaller tiles (docs/decisions/other-gpus.md).
_BACKWARD = {"selected.backward_items._items_kernel", "interval.win_grad_q._queries_kernel"}
_QUADRATIC = {"interval.cmp_grad_q._grad_q_kernel"}
TOO_MUCH = {
    "sm_80": _BACKWARD,
    "sm_90": _BACKWARD | _QUADRATIC,
    "sm_100": _BACKWARD | _QUADRATIC | {"interval.grad_kv._grad_kv_kernel"},
    "gfx942": _BACKWARD | {"interval.win_forward._forward_kernel"},
}
# Not launched by a layer of one rank that is called branch by branch.
OTHERS = {"gates.merge", "phi.mean", "selected.pages", "interval.unseen"}


def compiled(target: str, which: str, cache: Path) -> dict[str, int]:
    """The most bytes of shared memory of each kernel that was compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("target_compile.py")), target, *which.split()],
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    found: dict[str, int] = {}
    for name, shared in lines:
        found[name] = max(found.get(name, 0), int(shared))
    return found


def test_the_selection_fits_where_there_is_least(tmp_path):
    found = compiled("gfx942", "select", tmp_path)
    assert found.keys() == {"selection.importance._importance_kernel", "selection.top._top_kernel"}
    assert max(found.values()) <= SHARED_MEMORY["gfx942"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["", "wide"])
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_plain_kernel_of_training_compiles(target, which, tmp_path):
    package = ROOT / "kernels" / "nsa_kernels"
    kernels = set()
    for path in (path for room in ROOMS for path in (package / room).glob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        names = re.findall(r"@triton\.jit(?:\([^()]*\))?[^\n]*\ndef (\w+_kernel)\(", path.read_text())
        kernels |= {f"{module}.{name}" for name in names if module not in OTHERS}
    found = compiled(target, which, tmp_path)
    assert found.keys() == kernels
    too_much = {name: shared for name, shared in found.items() if shared > SHARED_MEMORY[target]}
    known = TOO_MUCH[target] if which == "wide" else set()
    assert too_much.keys() == known, too_much
