"""The inputs of one NSA layer, random or correlated, and what every query of its one document may see."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nsa_dist import NSAConfig
from nsa_kernels import ShortRows
from nsa_kernels.bench.cases import Case
from nsa_kernels.selected.short import ShortPlaces

CONFIG = NSAConfig()  # the paper's sizes


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

    def with_leaves(self, leaves: Iterable[Tensor]) -> "LayerInputs":
        """The same layer on other tensors, in the order of `leaves`."""
        take = iter(leaves)
        return replace(
            self,
            q=next(take),
            raw={branch: (next(take), next(take)) for branch in self.raw},
            gates=next(take),
            phi=[{name: next(take) for name in phi} for phi in self.phi],
        )


def make_inputs(case: Case, device: str = "cuda", seed: int = 0) -> LayerInputs:
    """Unit-variance bf16 inputs; gates are sigmoids of normal numbers, phi an MLP as wide as the head."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        make = _correlated if case.correlated and shape[0] == case.tokens else random
        return make(shape, generator, device).requires_grad_()

    def phi(dim: int) -> dict[str, Tensor]:
        heads, length = case.num_kv_heads, CONFIG.cmp_block_len
        width = length * dim
        shapes = {"pos_emb": (heads, length, dim), "w1": (heads, width, dim), "w2": (heads, dim, dim)}
        scales = {"pos_emb": 0.1, "w1": 2 * width**-0.5, "w2": 2 * dim**-0.5}
        return {
            name: (random(s, generator, device) * scales[name]).detach().requires_grad_() for name, s in shapes.items()
        }

    tokens, heads = case.tokens, case.num_kv_heads
    q = draw(tokens, case.num_q_heads, case.dim_k)
    raw = {b: (draw(tokens, heads, case.dim_k), draw(tokens, heads, case.dim_v)) for b in ("cmp", "slc", "win")}
    gates = random((tokens, case.num_q_heads, 3), generator, device).sigmoid().requires_grad_()
    return LayerInputs(case, q, raw, gates, [phi(case.dim_k), phi(case.dim_v)], generator)


def random(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def _correlated(shape: tuple[int, ...], generator: torch.Generator, device: str, step: int = 256) -> Tensor:
    """Along tokens, a path between independent points `step` tokens apart, with a fifth of the variance noise."""
    points = random((shape[0] // step + 2, *shape[1:]), generator, device)
    out = torch.empty(shape, device=device, dtype=torch.bfloat16)
    fraction = (torch.arange(step, device=device) / step)[:, None, None]
    for i, start in enumerate(range(0, shape[0], step)):
        part = out[start : start + step]
        between = torch.lerp(points[i].float(), points[i + 1].float(), fraction[: part.shape[0]])
        between = between / ((1 - fraction) ** 2 + fraction**2).sqrt()[: part.shape[0]]
        noise = random(tuple(part.shape), generator, device)
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
    short: ShortRows | None  # queries that choose all the blocks they see

    @classmethod
    def of(cls, case: Case, device: str) -> "Bounds":
        length, stride = CONFIG.cmp_block_len, CONFIG.cmp_stride
        position = torch.arange(case.tokens, dtype=torch.int32, device=device)
        num_cmp = max(0, (case.tokens - length) // stride + 1)
        pages = torch.arange(case.tokens // CONFIG.slc_block_len, dtype=torch.int32, device=device)
        return cls(
            position=position,
            block_rows=torch.arange(num_cmp, dtype=torch.int32, device=device) * stride,
            cmp_begin=torch.zeros_like(position),
            cmp_end=((position + 1 - length + stride) // stride).clamp(0, num_cmp).to(torch.int32),
            win_begin=(position + 1 - CONFIG.window_len).clamp(min=0),
            block_table=pages.expand(case.num_kv_heads, -1).contiguous(),
            short=cls._short(position),
        )

    @staticmethod
    def _short(position: Tensor) -> ShortRows | None:
        """As the layer has it for one document; None where all queries are, so that the selected kernels run at all."""
        length, place = CONFIG.slc_block_len, position.cpu()
        end = (place + 1).clamp(max=CONFIG.num_slc_blocks * length)
        is_short = place < end
        if bool(is_short.all()):
            return None
        return ShortRows.of(ShortPlaces(is_short[::length], torch.where(is_short, 0, end), end, None), position)
