"""One NSA layer as calls of public kernels, each of which can be timed and checked by itself.

A call says which function, its differentiable tensors, its other arguments, and which of both run over queries (or
compressed blocks), so that a check can ask the reference for a sample of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import nsa_kernels
from nsa_kernels.bench.cases import Case
from nsa_kernels.bench.inputs import CONFIG, Bounds, LayerInputs, random


@dataclass
class Branch:
    name: str
    function: str  # of nsa_kernels, and of its reference
    tensors: dict[str, Tensor]  # differentiable, where they require a gradient
    others: dict[str, Any]
    per_row: frozenset[str]  # arguments whose first dim is that of the output
    flops: float = 0.0  # of the forward: 2 per multiply-add that is needed, masked ones left out
    backward_flops: float = 0.0
    gate: Tensor | None = None  # [T, Hq]; gradients are then those of gate * output, from `function`_backward
    in_backward: bool = False  # the call is a part of the layer's backward
    options: dict[str, Any] = field(default_factory=dict)  # of nsa_kernels alone, as the layer passes them
    output: Any = None

    def forward(self, ops=nsa_kernels) -> Any:
        with torch.set_grad_enabled(self.gate is None):
            return getattr(ops, self.function)(**self.tensors, **self.others, **self._options(ops))

    def result(self) -> Any:
        """The output, computed once."""
        if self.output is None:
            self.output = self.forward()
        return self.output

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.requires_grad]

    def backward(self, output: Any, grad_out: Tensor, ops=nsa_kernels) -> Callable[[], tuple[Tensor, ...]]:
        """What gives the gradients of `leaves`, as the layer takes them; what is known before is not part of it."""
        if self.gate is None:
            out = first(output)
            return lambda: torch.autograd.grad(out, self.leaves, grad_out, retain_graph=True)
        out, lse = output
        delta = ops.gate_deltas(grad_out, out, out, out)[..., 0]
        tensors = {name: t.detach() for name, t in self.tensors.items()}
        function = getattr(ops, f"{self.function}_backward")
        words = {**tensors, **self.others, **self._options(ops)}
        return lambda: function(grad_out, self.gate, delta, lse, **words)[: len(tensors)]

    def _options(self, ops: Any) -> dict[str, Any]:
        return self.options if ops is nsa_kernels else {}


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def branches(x: LayerInputs) -> Iterator[Branch]:
    """The calls of a layer in order; the `result` of each feeds those after it, cut off from autograd."""
    case, bounds = x.case, Bounds.of(x.case, x.q.device.type)
    gates = x.gates.detach()
    compressed = []
    for name, raw, phi in zip(("compress k", "compress v"), x.raw["cmp"], x.phi, strict=True):
        branch = _compress(name, raw, phi, bounds, case)
        yield branch
        compressed.append(branch.result().detach().requires_grad_())

    interval = {"begin": bounds.cmp_begin, "end": bounds.cmp_end}
    cmp = _attention("cmp", "compressed_attention", x, compressed, interval, int(bounds.cmp_end.sum()), gates[..., 0])
    yield cmp
    out_cmp, lse_cmp = cmp.result()

    select = _select(x, compressed[0].detach(), lse_cmp, bounds, cmp.flops)
    yield select

    length = CONFIG.slc_block_len
    others_seen = (bounds.position // length).clamp(max=CONFIG.num_slc_blocks - 1) * length
    pairs = int((others_seen + bounds.position % length + 1).sum())
    selection = {
        "block_indices": select.result(),
        "block_table": bounds.block_table,
        "position": bounds.position,
        "slc_block_len": length,
    }
    slc = _attention("slc", "selected_attention", x, x.raw["slc"], selection, pairs, gates[..., 1])
    slc.options["short"] = bounds.short
    yield slc

    pairs = int((bounds.position + 1 - bounds.win_begin).sum())
    interval = {"begin": bounds.win_begin, "end": bounds.position + 1}
    win = _attention("win", "window_attention", x, x.raw["win"], interval, pairs, gates[..., 2])
    yield win

    outs = {"out_cmp": out_cmp, "out_slc": slc.result()[0], "out_win": win.result()[0]}
    yield _rows("combine", {"gates": gates, **outs})
    grad_out = random(out_cmp.shape, x.generator, x.q.device.type)
    yield _rows("gate_deltas", {"grad_out": grad_out, **outs}, in_backward=True)
    terms = {name: random(x.q.shape, x.generator, x.q.device.type) for name in ("cmp", "slc", "win")}
    yield _rows("sum_branches", terms, in_backward=True)


def _compress(name: str, raw: Tensor, phi: dict[str, Tensor], bounds: Bounds, case: Case) -> Branch:
    flops = 2.0 * len(bounds.block_rows) * case.num_kv_heads * (CONFIG.cmp_block_len + 1) * raw.shape[2] ** 2
    rows = {"block_rows": bounds.block_rows}
    return Branch(name, "compress_mlp", {"x": raw, **phi}, rows, frozenset(rows), flops, 2 * flops)


def _attention(name, function, x: LayerInputs, keys_values, others: dict, pairs: int, gate: Tensor) -> Branch:
    """`pairs` of query and key, over one head."""
    flops = 2.0 * pairs * x.case.num_q_heads * (x.case.dim_k + x.case.dim_v)
    tensors = dict(zip("qkv", (x.q, *keys_values), strict=True))
    others = {**others, "softmax_scale": x.case.softmax_scale}
    per_row = frozenset({"q", "begin", "end", "block_indices", "position"})
    branch = Branch(name, function, tensors, others, per_row, flops, 2.5 * flops, gate)
    if "begin" in others:
        branch.options["aligned"] = True  # one document begins where tiles do
    return branch


def _select(x: LayerInputs, k_cmp: Tensor, lse_cmp: Tensor, bounds: Bounds, cmp_flops: float) -> Branch:
    sizes = {f.name: getattr(CONFIG, f.name) for f in fields(CONFIG) if f.name != "window_len"}
    per_row = {
        "lse_cmp": lse_cmp,
        "cmp_begin": bounds.cmp_begin,
        "cmp_end": bounds.cmp_end,
        "position": bounds.position,
        "doc_start": torch.zeros_like(bounds.position),
    }
    others = {"k_cmp": k_cmp, **per_row, "softmax_scale": x.case.softmax_scale, **sizes}
    flops = cmp_flops * x.case.dim_k / (x.case.dim_k + x.case.dim_v)
    return Branch("select", "select_blocks", {"q": x.q.detach()}, others, frozenset({"q", *per_row}), flops)


def _rows(function: str, tensors: dict[str, Tensor], in_backward: bool = False) -> Branch:
    """A pass over rows, timed and checked as it is."""
    tensors = {name: t.detach() for name, t in tensors.items()}
    return Branch(function, function, tensors, {}, frozenset(tensors), in_backward=in_backward)
