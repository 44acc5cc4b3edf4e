"""Is a result right? Sampled rows against the reference, in fp32 on the same device.

The output gradient of a check is zero but on the sampled rows, so that the reference, which sees the sample alone, has
the same gradients of keys, values and weights as the kernel, which sees everything.
"""

import torch
from bench_layer import Branch
from torch import Tensor

from nsa_kernels import reference

# bf16 keeps 8 bits: results rounded once, from operands rounded once, are 2e-3 to 4e-3 off in the norm.
MAX_ERROR = 1e-2
# Rows of the selection that may differ: importances closer than fp32 can tell.
MAX_DIFFERING = 1e-2


def sample_rows(num_rows: int, device: torch.device, clusters: int = 8) -> Tensor:
    """Up to 64 row numbers: clusters of 8 neighbours, the first and the last rows among them."""
    size = min(8, num_rows)
    starts = torch.linspace(0, num_rows - size, clusters, device=device).long()
    return (starts[:, None] + torch.arange(size, device=device)).flatten().unique()


def check_branch(branch: Branch) -> str:
    """What is wrong with the branch's output or any gradient, or nothing."""
    output = branch.forward()
    first = output[0] if isinstance(output, tuple) else output
    rows = sample_rows(first.shape[0], first.device)
    expected_output = _sampled(branch, rows)
    if branch.name == "select":
        return _compare_selection(first[rows], expected_output["out"])
    grad = torch.zeros_like(first)
    grad[rows] = torch.randn(first[rows].shape, device=first.device).to(first.dtype)
    inputs = expected_output.pop("inputs")
    pairs = {"out": (first[rows], expected_output["out"])}
    if isinstance(output, tuple):
        pairs["softmax_lse"] = (output[1][rows], expected_output["lse"])
    actual = torch.autograd.grad(first, branch.leaves, grad)
    names = [name for name, t in branch.tensors.items() if t.requires_grad]
    wanted = torch.autograd.grad(expected_output["out"], [inputs[n] for n in names], grad[rows].float())
    for name, a, w in zip(names, actual, wanted, strict=True):
        pairs[f"d {name}"] = (a[rows] if name in branch.per_row else a, w)
    return complaints(pairs)


def complaints(pairs: dict[str, tuple[Tensor, Tensor]]) -> str:
    """The pairs (actual, expected) that are further apart than MAX_ERROR in the norm, NaN included."""
    errors = {}
    for name, (actual, expected) in pairs.items():
        finite = expected.isfinite()  # the lse of a row that sees nothing is -inf on both sides
        if not torch.equal(actual.isfinite(), finite):
            errors[name] = float("nan")
            continue
        actual, expected = actual[finite].double(), expected[finite].double()
        errors[name] = ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items() if not error <= MAX_ERROR)


def _sampled(branch: Branch, rows: Tensor) -> dict:
    """The reference's output on the sampled rows, and the fp32 inputs that it can be differentiated by."""
    inputs = {}
    for name, tensor in branch.tensors.items():
        part = tensor.detach()[rows] if name in branch.per_row else tensor.detach()
        inputs[name] = part.float().requires_grad_(tensor.requires_grad)
    others = {}
    for name, value in branch.others.items():
        value = value[rows] if name in branch.per_row else value
        others[name] = value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
    output = getattr(reference, branch.function)(**inputs, **others)
    out, lse = output if isinstance(output, tuple) else (output, None)
    return {"out": out, "lse": lse, "inputs": inputs}


def _compare_selection(actual: Tensor, expected: Tensor) -> str:
    differing = (actual != expected).any(-1).float().mean().item()
    return "" if differing <= MAX_DIFFERING else f"{differing:.1%} of the rows chose other blocks"
