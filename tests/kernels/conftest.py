"""Where the kernel tests run: natively on a CUDA device if there is one, else on the CPU in triton's interpreter.

`tests/conftest.py` chose already. Nothing is skipped: without a GPU and without the interpreter every kernel test is an
error.
"""

import pytest
import torch

if not torch.cuda.is_available():
    from kernels.interpreter import repair

    repair()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of every tensor of a kernel test."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
