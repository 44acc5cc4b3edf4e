"""Cases that triton's interpreter takes many seconds for: `make test-all` runs them, and a GPU does always."""

import pytest
import torch

SLOW_WITHOUT_A_GPU = () if torch.cuda.is_available() else (pytest.mark.slow,)
