"""Every kernel at 65,536 tokens on a GPU: the twice rule on sampled queries, block sets, and the layer's bits.

The output gradient is zero but on the sampled queries, so that what sees these alone has the same gradients.
"""

import pytest
import torch
from torch import Tensor

from kernels import plain
from kernels.judge import assert_twice, rms
from kernels.ties import assert_same_but_for_ties
from nsa_kernels.bench.branches import Branch, branches, first
from nsa_kernels.bench.cases import KINDS, TARGETS
from nsa_kernels.bench.checks import Wanted, check_branch, sample_rows, sampled, sampled_gradient
from nsa_kernels.bench.inputs import make_inputs
from nsa_kernels.bench.layer import whole_layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("case", [*TARGETS, *KINDS], ids=lambda case: case.name)
def test_real_sizes(case):
    expected = None
    for branch in branches(make_inputs(case)):
        if branch.name == "select":
            rows = sample_rows(case.tokens, branch.tensors["q"].device)
            arguments = {name: x[rows] if name in branch.per_row else x for name, x in _arguments(branch).items()}
            tensors = [arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], Tensor)]
            ties = assert_same_but_for_ties(tensors, arguments, branch.result()[rows])
            print(f"{case.name}: {ties} of {len(rows) * case.num_kv_heads} sampled rows differ by a tie")
        elif branch.gate is not None or branch.function == "compress_mlp":
            _assert_twice(branch, case.correlated)
        else:
            assert check_branch(branch, Wanted()) == ""
        expected = branch.result() if branch.name == "combine" else expected
    x = make_inputs(case)
    layer = whole_layer(x)
    grad = torch.randn_like(x.q[..., : case.dim_v])
    runs = []
    for _ in range(2):
        out = layer()
        runs.append((out.detach(), *torch.autograd.grad(out, x.leaves, grad)))
    assert torch.equal(runs[0][0], expected)
    assert all(map(torch.equal, *runs))


def _arguments(branch: Branch) -> dict:
    return {**branch.tensors, **branch.others}


def _assert_twice(branch: Branch, correlated: bool) -> None:
    """out and the gradients of the branch against fp64, beside PyTorch in the dtype of the inputs.

    Where neighbouring keys and values are alike, dS cancels in dQ, but what delta = sum(dO * out) lost when out was
    rounded does not; plain PyTorch sums P * dP instead. There dQ is held in the root mean square alone.
    """
    output = branch.result()
    actual = first(output).detach()
    rows = sample_rows(len(actual), actual.device)
    grad = sampled_gradient(tuple(actual.shape), rows, actual.dtype)
    names = [name for name, x in branch.tensors.items() if x.requires_grad]
    results = {"actual": [actual[rows], *branch.backward(output, grad)()]}
    inputs, out, _ = sampled(branch, rows, torch.float64)
    results["exact"] = [out.detach(), *_gradients(branch, inputs, names, out, rows, grad)]
    inputs = {name: x.detach()[rows] if name in branch.per_row else x.detach() for name, x in branch.tensors.items()}
    inputs = {name: x.requires_grad_(name in names) for name, x in inputs.items()}
    out = _plain(branch, inputs, rows)
    results["plain"] = [out.detach(), *_gradients(branch, inputs, names, out, rows, grad)]
    for i, name in enumerate(["out", *names]):
        a, p, e = (results[which][i] for which in ("actual", "plain", "exact"))
        sample = a[rows] if i and name in branch.per_row else a
        if correlated and name == "q":
            assert rms(sample - e) <= 2 * rms(p - e)
        else:
            assert_twice(f"{branch.name} {name}", sample, p, e)


def _gradients(branch: Branch, inputs: dict[str, Tensor], names: list[str], out: Tensor, rows: Tensor, grad: Tensor):
    gated = out if branch.gate is None else branch.gate[rows].to(out.dtype)[..., None] * out
    return torch.autograd.grad(gated, [inputs[name] for name in names], grad[rows].to(out.dtype))


def _plain(branch: Branch, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    others = {name: x[rows] if name in branch.per_row else x for name, x in branch.others.items()}
    if branch.function == "compress_mlp":
        return plain.compress_mlp(**inputs, **others)
    if branch.function != "selected_attention":
        return plain.interval_attention(**inputs, **others)[0]
    key = torch.arange(len(inputs["k"]), device=rows.device)
    chosen = (others["block_indices"][..., None] == key // others["slc_block_len"]).any(2)  # [rows, Hkv, T]
    visible = (chosen & (key <= others["position"][:, None, None])).transpose(0, 1)
    visible = visible.repeat_interleave(inputs["q"].shape[1] // visible.shape[0], 0)
    return plain.masked_attention(**inputs, visible=visible, softmax_scale=others["softmax_scale"])[0]
