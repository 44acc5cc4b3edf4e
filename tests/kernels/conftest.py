"""Where the kernel tests run: natively on a CUDA device if there is one, else on the CPU in triton's interpreter.

Triton decides between the two when it is imported (the decorator `triton.jit` reads `TRITON_INTERPRET` there), so
this file, which pytest loads before any test module of the folder, must set it first. Nothing is skipped: without a
GPU and without the interpreter every kernel test is an error.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "triton was imported without TRITON_INTERPRET=1, and there is no CUDA device: kernels compiled for a GPU "
            "cannot run here. Set TRITON_INTERPRET=1 in the environment, or run tests/kernels by itself"
        )
    os.environ["TRITON_INTERPRET"] = "1"

    from kernels.interpreter import repair

    repair()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of every tensor of a kernel test."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
