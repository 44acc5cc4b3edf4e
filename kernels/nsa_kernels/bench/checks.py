"""Is a result right? Sampled rows against the reference, in fp32 on the same device.

The output gradient of a check is zero but on the sampled rows, so that the reference, which sees the sample alone, has
the same gradients of keys, values and weights as the kernel, which sees everything. The whole layer is checked with the
same output gradient, against what the reference found for its branches.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa_kernels import reference
from nsa_kernels.bench.branches import Branch, first
from nsa_kernels.bench.inputs import LayerInputs

# bf16 keeps 8 bits: results rounded once, from operands rounded once, are 2e-3 to 4e-3 off in the norm.
MAX_ERROR = 1e-2
# Rows of the selection that may differ: importances closer than fp32 can tell.
MAX_DIFFERING = 1e-2


@dataclass
class Wanted:
    """What the reference says of the whole layer, filled branch by branch: results on the sampled rows of queries."""

    out: Tensor | float = 0.0
    grad_q: Tensor | float = 0.0
    grad_gates: list[Tensor] = field(default_factory=list)
    grad_kv: dict[str, list[Tensor]] = field(default_factory=dict)  # of slc and win, for every row

    def add(self, branch: Branch, rows: Tensor, out: Tensor, grad_out: Tensor, grads: list[Tensor]) -> None:
        assert branch.gate is not None
        self.out = self.out + branch.gate[rows].float()[..., None] * out
        self.grad_q = self.grad_q + grads[0]
        self.grad_gates.append((out * grad_out).sum(-1))
        if branch.name != "cmp":  # whose keys are compressed before
            self.grad_kv[branch.name] = grads[1:]


def sample_rows(num_rows: int, device: torch.device, clusters: int = 8) -> Tensor:
    """Up to 64 row numbers: clusters of 8 neighbours, the first and the last rows among them."""
    size = min(8, num_rows)
    starts = torch.linspace(0, num_rows - size, clusters, device=device).long()
    return (starts[:, None] + torch.arange(size, device=device)).flatten().unique()


def sampled_gradient(shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
    """An output gradient that is 0 but on `rows`; the same for every branch and the layer."""
    generator = torch.Generator(device=rows.device).manual_seed(1)
    grad = torch.zeros(shape, dtype=dtype, device=rows.device)
    grad[rows] = torch.randn(len(rows), *shape[1:], generator=generator, device=rows.device).to(dtype)
    return grad


def check_branch(branch: Branch, wanted: Wanted) -> str:
    """What is wrong with the branch's output or any gradient, or nothing; adds what the layer should be to `wanted`."""
    output = branch.result()
    actual = first(output)
    rows = sample_rows(actual.shape[0], actual.device)
    inputs, out, lse = sampled(branch, rows)
    if branch.name == "select":
        return _compare_selection(actual[rows], out)
    pairs = {"out": (actual[rows], out)}
    if lse is not None:
        pairs["softmax_lse"] = (output[1][rows], lse)
    names = [name for name, t in branch.tensors.items() if t.requires_grad]
    if names:
        grad = sampled_gradient(tuple(actual.shape), rows, actual.dtype)
        grads = branch.backward(output, grad)()
        gated = out if branch.gate is None else branch.gate[rows].float()[..., None] * out
        expected = torch.autograd.grad(gated, [inputs[n] for n in names], grad[rows].float())
        for name, a, w in zip(names, grads, expected, strict=True):
            pairs[f"d {name}"] = (a[rows] if name in branch.per_row else a, w)
        if branch.gate is not None:
            wanted.add(branch, rows, out.detach(), grad[rows].float(), list(expected))
    return complaints(pairs)


def check_layer(x: LayerInputs, out: Tensor, wanted: Wanted) -> str:
    """What is wrong with the layer's output or gradients; those of phi and what it compresses are not looked at."""
    rows = sample_rows(out.shape[0], out.device)
    grad = sampled_gradient(tuple(out.shape), rows, out.dtype)
    leaves = {"q": x.q, "gates": x.gates}
    leaves |= {f"{name} {b}": t for b in wanted.grad_kv for name, t in zip("kv", x.raw[b], strict=True)}
    grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    pairs = {
        "out": (out.detach()[rows], torch.as_tensor(wanted.out)),
        "d q": (grads["q"][rows], torch.as_tensor(wanted.grad_q)),
        "d gates": (grads["gates"][rows], torch.stack(wanted.grad_gates, -1)),
    }
    for b, expected in wanted.grad_kv.items():
        pairs |= {f"d {name} {b}": (grads[f"{name} {b}"], e) for name, e in zip("kv", expected, strict=True)}
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


def sampled(
    branch: Branch, rows: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """The inputs in `dtype`, the reference's output for the sampled rows, differentiable by them, its lse if any."""
    inputs = {}
    for name, tensor in branch.tensors.items():
        part = tensor.detach()[rows] if name in branch.per_row else tensor.detach()
        inputs[name] = part.to(dtype).requires_grad_(tensor.requires_grad)
    others = {}
    for name, value in branch.others.items():
        value = value[rows] if name in branch.per_row else value
        others[name] = value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
    output = getattr(reference, branch.function)(**inputs, **others)
    return (inputs, *output) if isinstance(output, tuple) else (inputs, output, None)


def _compare_selection(actual: Tensor, expected: Tensor) -> str:
    differing = (actual != expected).any(-1).float().mean().item()
    return "" if differing <= MAX_DIFFERING else f"{differing:.1%} of the rows chose other blocks"
