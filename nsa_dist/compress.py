"""The learnable block compression phi (arXiv 2502.11089, eq. 7)."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_dist.rope import rotate
from nsa_dist.rope_scaling import Rotary
from nsa_kernels import reference

# phi: ([M, l, Hkv, D], in-document start of each block [M]) -> [M, Hkv, D]
Compress = Callable[..., Tensor]


class BlockPlaces(NamedTuple):
    """Which blocks phi is to compress: M of them, each `block_len` rows of what it is given."""

    rows: Tensor  # int32 [M]: where each begins
    start: Tensor  # int64 [M]: position of its first token in its document
    block_len: int


class PhiForm(NamedTuple):
    """A phi that is no more than an MLP or the mean, and a turn by the position of each block's first token."""

    mlp: tuple[Tensor, Tensor, Tensor] | None  # pos_emb, w1, w2; None: the mean
    rotary: Rotary | None  # None: it is not turned

    @classmethod
    def of(cls, phi: Compress | None, block_len: int) -> "PhiForm | None":
        """None for any other function."""
        if phi is None:
            return cls(None, None)
        form = getattr(phi, "form", None)
        return form(block_len) if form else None


def compress_both(
    phis: tuple[Compress | None, Compress | None],
    rows: tuple[Tensor, Tensor],
    places: BlockPlaces,
    ops: ModuleType,
    run: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The compressed keys [M, Hkv, Dk] and values [M, Hkv, Dv] of rows [R, Hkv, Dk], [R, Hkv, Dv].

    run         of `Call`, for kernels that keep tapes of their launches

    ValueError if a phi does not return one vector for each block and head.
    """
    weights = [getattr(phi, "mlp_weights", lambda: None)() for phi in phis]
    if None not in weights:
        options = {"run": run} if run else {}
        pair = ops.compress_mlp_pair(*rows, places.rows, *weights, **options)
    else:
        pair = compress_one(phis[0], rows[0], places, ops), compress_one(phis[1], rows[1], places, ops)
    names = ("compress_k", "compress_v")
    k, v = (_checked(name, y, x, places) for name, y, x in zip(names, pair, rows, strict=True))
    return k, v


def _checked(name: str, compressed: Tensor, rows: Tensor, places: BlockPlaces) -> Tensor:
    """What a phi returned, in the dtype of its rows. ValueError if it is not one vector for each block and head."""
    expected = (len(places.rows), *rows.shape[1:])
    shape = tuple(compressed.shape) if isinstance(compressed, Tensor) else type(compressed).__name__
    if shape != expected or not compressed.is_floating_point() or compressed.device != rows.device:
        given = f"{compressed.dtype} {shape} on {compressed.device}" if isinstance(compressed, Tensor) else shape
        raise ValueError(
            f"{name} returned {given}, but must return a floating-point {expected} on {rows.device}: one compressed "
            f"vector for each of the {expected[0]} blocks it was given and each kv head; return [M, Hkv, D]"
        )
    return compressed.to(rows.dtype)


def compress_one(phi: Compress | None, rows: Tensor, places: BlockPlaces, ops: ModuleType) -> Tensor:
    """What `phi` returns for `rows` [R, Hkv, D], unchecked; None: the mean."""
    if phi is None:
        return ops.compress_mean(rows, places.rows, places.block_len)
    if getattr(phi, "takes_rows", False):
        return phi(rows, places.start, block_rows=places.rows, ops=ops)
    index = places.rows.long()[:, None] + torch.arange(places.block_len, device=rows.device)
    blocks = rows.index_select(0, index.flatten()).unflatten(0, index.shape)  # [M, l, Hkv, D]
    return phi(blocks, places.start)


class CompressMLP(nn.Module):
    """An MLP over the concatenated block, its intra-block position embedding added first; each kv head its own.

        y[i, h] = gelu(vec(x[block i, h] + pos_emb[h]) @ w1[h]) @ w2[h]

    `forward` takes what `nsa_attention` hands to any phi, blocks [M, l, Hkv, D] and their in-document starts [M]. It
    can also take rows in place (`block_rows`), so that blocks, which overlap, need not be copied out first.
    """

    takes_rows = True  # nsa_attention may pass rows and block_rows instead of blocks

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        block_len: int,
        hidden_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = head_dim if hidden_dim is None else hidden_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_kv_heads, *shape, device=device, dtype=dtype))

        self.pos_emb = empty(block_len, head_dim)
        self.w1 = empty(block_len * head_dim, hidden_dim)
        self.w2 = empty(hidden_dim, head_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Keep the variance of what passes through: fan-in scaling, a small position embedding."""
        self.pos_emb.normal_(std=0.02)
        self.w1.normal_(std=1 / math.sqrt(self.w1.shape[1]))
        self.w2.normal_(std=1 / math.sqrt(self.w2.shape[1]))

    def forward(
        self,
        x: Tensor,
        block_start: Tensor,
        block_rows: Tensor | None = None,
        ops: ModuleType = reference,
    ) -> Tensor:
        """[M, l, Hkv, D] (or, with block_rows [M], rows [R, Hkv, D]) -> [M, Hkv, D]."""
        if block_rows is None:
            num_blocks, block_len = x.shape[:2]
            block_rows = torch.arange(num_blocks, device=x.device, dtype=torch.int32) * block_len
            x = x.flatten(0, 1)
        return ops.compress_mlp(x, block_rows, self.pos_emb, self.w1, self.w2)

    def mlp_weights(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(pos_emb, w1, w2) if a call does no more than `ops.compress_mlp` of them: two such phis run together."""
        if type(self).forward is not CompressMLP.forward or _is_hooked(self):
            return None
        return self.pos_emb, self.w1, self.w2

    def form(self, block_len: int) -> PhiForm | None:
        """Of blocks of `block_len`; None if a subclass or a hook does something else."""
        weights = self.mlp_weights()
        return None if weights is None else PhiForm(weights, None)


class TurnedCompressMLP(CompressMLP):
    """`CompressMLP` whose result is turned to the position of each block's first token: compressed before RoPE."""

    def __init__(self, *sizes: Any, rotary: Rotary | None, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.rotary = rotary  # None: not turned

    def forward(
        self,
        x: Tensor,
        block_start: Tensor,
        block_rows: Tensor | None = None,
        ops: ModuleType = reference,
    ) -> Tensor:
        """As `CompressMLP.forward`, then turned."""
        compressed = super().forward(x, block_start, block_rows, ops)
        return compressed if self.rotary is None else rotate(compressed, block_start, self.rotary)

    def form(self, block_len: int) -> PhiForm | None:
        """As `CompressMLP.form`."""
        if type(self).forward is not TurnedCompressMLP.forward or _is_hooked(self):
            return None
        return PhiForm((self.pos_emb, self.w1, self.w2), self.rotary)


class MeanCompress(nn.Module):
    """The parameter-free phi, the mean of a block; turns what it compressed if `rotary` is given."""

    takes_rows = True

    def __init__(self, block_len: int, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.block_len = block_len
        self.rotary = rotary

    def forward(self, x: Tensor, block_start: Tensor, block_rows: Tensor, ops: ModuleType) -> Tensor:
        """Rows [R, Hkv, D], the first row of each block [M] and its position [M] -> [M, Hkv, D]."""
        compressed = ops.compress_mean(x, block_rows, self.block_len)
        return compressed if self.rotary is None else rotate(compressed, block_start, self.rotary)

    def form(self, block_len: int) -> PhiForm | None:
        """As `CompressMLP.form`."""
        if type(self).forward is not MeanCompress.forward or _is_hooked(self) or block_len != self.block_len:
            return None
        return PhiForm(None, self.rotary)


def _is_hooked(phi: nn.Module) -> bool:
    return any((phi._forward_pre_hooks, phi._forward_hooks, phi._backward_pre_hooks, phi._backward_hooks))
