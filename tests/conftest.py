"""Before any test module is imported: without a GPU triton's kernels run in its interpreter.

Triton decides between the two when it is imported (the decorator `triton.jit` reads `TRITON_INTERPRET` there), and
tests outside of `tests/kernels` import what imports it.
"""

import os
import sys

import pytest
import torch

# Files whose processes take minutes: begun first, so that `make test` does not wait for one of them at its end.
LONGEST = ("train/test_runs.py", "launch/test_runs.py")

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without TRITON_INTERPRET=1, and there is no CUDA device: kernels compiled for a GPU "
            "cannot run here. Set TRITON_INTERPRET=1 in the environment"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path).endswith(LONGEST))
