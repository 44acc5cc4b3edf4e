"""Before any test module is imported: without a GPU triton's kernels run in its interpreter.

Triton decides between the two when it is imported (the decorator `triton.jit` reads `TRITON_INTERPRET` there), and
tests outside of `tests/kernels` import what imports it.
"""

import os
import sys

import pytest
import torch

# Files that take longest, in their order: begun first, so that `make test` does not wait for one of them at its end.
LONGEST = (
    "train/test_runs.py", "launch/test_runs.py", "cp/test_cases.py", "kernels/test_window_attention.py",
    "kernels/test_select.py", "kernels/test_cmp_attention.py", "kernels/test_slc_attention.py",
    "kernels/test_bench.py", "bench/test_cp.py", "train/test_tokens.py", "kernels/test_compress.py",
    "kernels/test_ranks.py", "kernels/test_strides.py", "kernels/test_wild.py",
)  # fmt: skip

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without TRITON_INTERPRET=1, and there is no CUDA device: kernels compiled for a GPU "
            "cannot run here. Set TRITON_INTERPRET=1 in the environment"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if str(item.path).endswith(name)), 99))
