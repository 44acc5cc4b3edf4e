"""One NSA layer through the public kernels, as branches that can be timed and checked one by one.

A branch is a call: which function, its differentiable tensors, its other arguments, and which of both run over queries
(or compressed blocks), so that a check can ask the reference for a sample of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_cases import Case
from torch import Tensor

import nsa_kernels

CMP_BLOCK_LEN, CMP_STRIDE, SLC_BLOCK_LEN, NUM_SLC_BLOCKS, WINDOW_LEN = 32, 16, 64, 16, 512
SELECTION = {
    "cmp_block_len": CMP_BLOCK_LEN,
    "cmp_stride": CMP_STRIDE,
    "slc_block_len": SLC_BLOCK_LEN,
    "num_slc_blocks": NUM_SLC_BLOCKS,
    "num_init_blocks": 1,
    "num_local_blocks": 2,
}


@dataclass
class Branch:
    name: str
    function: str  # of nsa_kernels, and of its reference
    tensors: dict[str, Tensor]  # differentiable
    others: dict[str, Any]
    per_row: frozenset[str]  # arguments whose first dim is that of the output
    flops: float  # of the forward: 2 per multiply-add that is needed, masked ones left out
    backward_flops: float

    def forward(self, ops=nsa_kernels) -> Any:
        return getattr(ops, self.function)(**self.tensors, **self.others)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.requires_grad]


@dataclass
class LayerInputs:
    case: Case
    q: Tensor
    raw: dict[str, tuple[Tensor, Tensor]]  # branch -> (k, v) [T, Hkv, D]; those of cmp before compression
    gates: Tensor
    phi: list[dict[str, Tensor]]  # of keys, of values
    generator: torch.Generator = field(repr=False)

    @property
    def leaves(self) -> list[Tensor]:
        pairs = [t for pair in self.raw.values() for t in pair]
        return [self.q, *pairs, self.gates, *(t for phi in self.phi for t in phi.values())]


def make_inputs(case: Case, device: str = "cuda", seed: int = 0) -> LayerInputs:
    """Unit-variance bf16 inputs; gates are sigmoids of normal numbers, phi an MLP as wide as the head."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        make = _correlated if case.correlated and shape[0] == case.tokens else _random
        return make(shape, generator, device).requires_grad_()

    def phi(dim: int) -> dict[str, Tensor]:
        heads, width = case.num_kv_heads, CMP_BLOCK_LEN * dim
        shapes = {"pos_emb": (heads, CMP_BLOCK_LEN, dim), "w1": (heads, width, dim), "w2": (heads, dim, dim)}
        scales = {"pos_emb": 0.1, "w1": 2 * width**-0.5, "w2": 2 * dim**-0.5}
        return {
            name: (_random(s, generator, device) * scales[name]).detach().requires_grad_() for name, s in shapes.items()
        }

    tokens, heads = case.tokens, case.num_kv_heads
    q = draw(tokens, case.num_q_heads, case.dim_k)
    raw = {b: (draw(tokens, heads, case.dim_k), draw(tokens, heads, case.dim_v)) for b in ("cmp", "slc", "win")}
    gates = _random((tokens, case.num_q_heads, 3), generator, device).sigmoid().requires_grad_()
    return LayerInputs(case, q, raw, gates, [phi(case.dim_k), phi(case.dim_v)], generator)


def _random(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def _correlated(shape: tuple[int, ...], generator: torch.Generator, device: str, step: int = 256) -> Tensor:
    """Along tokens, a path between independent points `step` tokens apart, with a fifth of the variance noise."""
    points = _random((shape[0] // step + 2, *shape[1:]), generator, device)
    out = torch.empty(shape, device=device, dtype=torch.bfloat16)
    fraction = (torch.arange(step, device=device) / step)[:, None, None]
    for i, start in enumerate(range(0, shape[0], step)):
        part = out[start : start + step]
        between = torch.lerp(points[i].float(), points[i + 1].float(), fraction[: part.shape[0]])
        between = between / ((1 - fraction) ** 2 + fraction**2).sqrt()[: part.shape[0]]
        noise = _random(tuple(part.shape), generator, device)
        part.copy_(0.8**0.5 * between + 0.2**0.5 * noise)
    return out


@dataclass(frozen=True)
class Bounds:
    """What every query of one document may see."""

    position: Tensor
    block_rows: Tensor
    cmp_begin: Tensor
    cmp_end: Tensor
    win_begin: Tensor
    block_table: Tensor

    @classmethod
    def of(cls, case: Case, device: str) -> "Bounds":
        position = torch.arange(case.tokens, dtype=torch.int32, device=device)
        num_cmp = max(0, (case.tokens - CMP_BLOCK_LEN) // CMP_STRIDE + 1)
        pages = torch.arange(case.tokens // SLC_BLOCK_LEN, dtype=torch.int32, device=device)
        return cls(
            position=position,
            block_rows=torch.arange(num_cmp, dtype=torch.int32, device=device) * CMP_STRIDE,
            cmp_begin=torch.zeros_like(position),
            cmp_end=((position + 1 - CMP_BLOCK_LEN + CMP_STRIDE) // CMP_STRIDE).clamp(0, num_cmp).to(torch.int32),
            win_begin=(position + 1 - WINDOW_LEN).clamp(min=0),
            block_table=pages.expand(case.num_kv_heads, -1).contiguous(),
        )


def branches(x: LayerInputs) -> Iterator[Branch]:
    """The branches in order; each is run once to feed those after it, its results cut off from autograd."""
    case, bounds = x.case, Bounds.of(x.case, x.q.device.type)
    scale = case.softmax_scale
    compressed = []
    for name, raw, phi in zip(("compress k", "compress v"), x.raw["cmp"], x.phi, strict=True):
        width = raw.shape[2]
        flops = 2.0 * len(bounds.block_rows) * case.num_kv_heads * (CMP_BLOCK_LEN + 1) * width**2
        branch = Branch(
            name=name,
            function="compress_mlp",
            tensors={"x": raw, **phi},
            others={"block_rows": bounds.block_rows},
            per_row=frozenset({"block_rows"}),
            flops=flops,
            backward_flops=2 * flops,
        )
        yield branch
        compressed.append(branch.forward().detach().requires_grad_())

    interval = frozenset({"q", "begin", "end"})
    cmp = _attention("cmp", "compressed_attention", x.q, *compressed, interval, case, int(bounds.cmp_end.sum()))
    cmp.others = {"begin": bounds.cmp_begin, "end": bounds.cmp_end, "softmax_scale": scale}
    yield cmp
    out_cmp, lse_cmp = (t.detach() for t in cmp.forward())

    select = Branch(
        name="select",
        function="select_blocks",
        tensors={"q": x.q.detach()},
        others={
            "k_cmp": compressed[0].detach(),
            "lse_cmp": lse_cmp,
            "cmp_begin": bounds.cmp_begin,
            "cmp_end": bounds.cmp_end,
            "position": bounds.position,
            "doc_start": torch.zeros_like(bounds.position),
            "softmax_scale": scale,
            **SELECTION,
        },
        per_row=frozenset({"q", "lse_cmp", "cmp_begin", "cmp_end", "position", "doc_start"}),
        flops=cmp.flops * case.dim_k / (case.dim_k + case.dim_v),
        backward_flops=0.0,
    )
    yield select
    block_indices = select.forward()

    others_seen = (bounds.position // SLC_BLOCK_LEN).clamp(max=NUM_SLC_BLOCKS - 1) * SLC_BLOCK_LEN
    pairs = int((others_seen + bounds.position % SLC_BLOCK_LEN + 1).sum())
    per_query = frozenset({"q", "block_indices", "position"})
    slc = _attention("slc", "selected_attention", x.q, *x.raw["slc"], per_query, case, pairs)
    slc.others = {
        "block_indices": block_indices,
        "block_table": bounds.block_table,
        "position": bounds.position,
        "slc_block_len": SLC_BLOCK_LEN,
        "softmax_scale": scale,
    }
    yield slc
    out_slc = slc.forward()[0].detach()

    pairs = int((bounds.position + 1 - bounds.win_begin).sum())
    win = _attention("win", "window_attention", x.q, *x.raw["win"], interval, case, pairs)
    win.others = {"begin": bounds.win_begin, "end": bounds.position + 1, "softmax_scale": scale}
    yield win
    out_win = win.forward()[0].detach()

    outs = {"out_cmp": out_cmp, "out_slc": out_slc, "out_win": out_win}
    tensors = {"gates": x.gates, **{name: out.requires_grad_() for name, out in outs.items()}}
    yield Branch("combine", "combine", tensors, {}, frozenset(tensors), 0.0, 0.0)


def _attention(name, function, q, k, v, per_row, case: Case, pairs: int) -> Branch:
    """`pairs` of query and key, over one head."""
    flops = 2.0 * pairs * case.num_q_heads * (case.dim_k + case.dim_v)
    return Branch(name, function, {"q": q, "k": k, "v": v}, {}, per_row, flops, 2.5 * flops)


def layer(x: LayerInputs, bounds: Bounds, ops=nsa_kernels) -> Tensor:
    """The whole layer: out [T, Hq, Dv]."""
    scale = x.case.softmax_scale
    keys, values = (
        ops.compress_mlp(raw, bounds.block_rows, **phi) for raw, phi in zip(x.raw["cmp"], x.phi, strict=True)
    )
    out_cmp, lse_cmp = ops.compressed_attention(
        x.q, keys, values, bounds.cmp_begin, bounds.cmp_end, softmax_scale=scale
    )
    block_indices = ops.select_blocks(
        x.q.detach(),
        keys.detach(),
        lse_cmp.detach(),
        bounds.cmp_begin,
        bounds.cmp_end,
        bounds.position,
        torch.zeros_like(bounds.position),
        softmax_scale=scale,
        **SELECTION,
    )
    out_slc, _ = ops.selected_attention(
        x.q,
        *x.raw["slc"],
        block_indices,
        bounds.block_table,
        bounds.position,
        slc_block_len=SLC_BLOCK_LEN,
        softmax_scale=scale,
    )
    out_win, _ = ops.window_attention(x.q, *x.raw["win"], bounds.win_begin, bounds.position + 1, softmax_scale=scale)
    return ops.combine(x.gates, out_cmp, out_slc, out_win)


def whole_layer(x: LayerInputs) -> Callable[[], Tensor]:
    bounds = Bounds.of(x.case, x.q.device.type)
    return lambda: layer(x, bounds)
