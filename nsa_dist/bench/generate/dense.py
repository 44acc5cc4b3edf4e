"""The same model with dense attention: a plain K/V cache, and PyTorch's fused kernels.

Its weights are those of a GPT of NSA layers: of each layer the queries, the keys and values of the selected branch, and
the output's projection. Gates, phi and the other branches are left out, so their columns are not computed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_dist.bench.decode.measure import BACKENDS
from nsa_dist.inference.model import GPT
from nsa_dist.layer import NSALayer
from nsa_dist.rope import Positions


class DenseAttention:
    """Causal attention by the weights of one NSA layer; keys and values [batch, Hkv, num_tokens, D]."""

    def __init__(self, layer: NSALayer, batch: int, num_tokens: int) -> None:
        self.layer = layer
        group = layer.num_q_heads // layer.num_kv_heads
        self.widths = [group * layer.head_dim, layer.head_dim, layer.v_head_dim]
        rows = layer.qkv.weight.unflatten(0, (layer.num_kv_heads, -1))
        first = self.widths[0] + (0 if layer.shared_kv else layer.head_dim + layer.v_head_dim)  # of k_slc
        parts = rows[:, : self.widths[0]], rows[:, first : first + sum(self.widths[1:])]
        self.weight = torch.cat(parts, 1).flatten(0, 1).contiguous()
        self.k_norm = layer.k_norm["shared" if layer.shared_kv else "slc"]
        shape = batch, layer.num_kv_heads, num_tokens
        self.k, self.v = (rows.new_zeros(*shape, dim) for dim in self.widths[1:])

    def prefill(self, x: Tensor, slot: int, positions: Positions) -> Tensor:
        """x [T, hidden], the whole prompt of one sequence -> [T, hidden]."""
        q, k, v = self._project(x, positions)
        self.k[slot, :, : len(x)], self.v[slot, :, : len(x)] = k.transpose(0, 1), v.transpose(0, 1)
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.layer.proj(out[0].transpose(0, 1).flatten(1))

    def step(self, x: Tensor, length: int, positions: Positions) -> Tensor:
        """x [batch, 1, hidden], a token behind `length` others of each -> [batch, 1, hidden]."""
        q, k, v = self._project(x[:, 0], positions)
        self.k[:, :, length], self.v[:, :, length] = k, v
        held = self.k[:, :, : length + 1], self.v[:, :, : length + 1]
        out = F.scaled_dot_product_attention(q[:, :, None], *held, enable_gqa=True)
        return self.layer.proj(out[:, :, 0].flatten(1))[:, None]

    def _project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> q [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv]."""
        layer = self.layer
        mixed = F.linear(x, self.weight).unflatten(-1, (layer.num_kv_heads, -1))
        q, k, v = mixed.split(self.widths, -1)
        q, k = layer.q_norm(q.unflatten(-1, (-1, layer.head_dim)).flatten(1, 2)), self.k_norm(k)
        turns = positions.turns(layer.rotary, layer.head_dim, q.dtype)
        q, k = turns.of(torch.cat([q, k], 1)).split([layer.num_q_heads, layer.num_kv_heads], 1)
        return q, k, v


class DenseTwin:
    """`batch` sequences of `num_tokens` tokens at most."""

    def __init__(self, model: GPT, batch: int, num_tokens: int) -> None:
        self.model = model
        self.attention = [DenseAttention(block.attention, batch, num_tokens) for block in model.layers]

    @property
    def cache_bytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.attention)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, slot: int = 0, rows: Sequence[int] = (-1,)) -> Tensor:
        """tokens [T] -> logits [rows, vocab]."""
        x = self.model.embedding(tokens)
        positions = Positions(torch.arange(len(x), device=x.device))
        for block, attention in zip(self.model.layers, self.attention, strict=True):
            x = x + attention.prefill(block.attention_norm(x), slot, positions)
            x = x + block.mlp(block.mlp_norm(x))
        return self.model._logits(x[list(rows)])

    @torch.no_grad()
    def step(self, tokens: Tensor, length: int) -> Tensor:
        """tokens [batch, 1] -> logits [batch, 1, vocab]."""
        x = self.model.embedding(tokens)
        positions = Positions(torch.full((len(x),), length, device=x.device))
        for block, attention in zip(self.model.layers, self.attention, strict=True):
            x = x + attention.step(block.attention_norm(x), length, positions)
            x = x + block.mlp(block.mlp_norm(x))
        return self.model._logits(x)


@contextmanager
def by(backend: str | None) -> Iterator[None]:
    """Inside, attention is by this kernel of PyTorch's, "flash" or "cuDNN"; None: its own choice."""
    if backend is None:
        yield
        return
    kernels: list[SDPBackend] = [BACKENDS[backend]]
    with sdpa_kernel(kernels):
        yield
