"""Paged caches of drawn sequences, NaN wherever nothing is kept, for the tests of decoding."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_kernels.decode_contracts import DecodeSizes, PagedCache, in_pages
from nsa_kernels.reference.decode import num_whole

PAPER = DecodeSizes(32, 16, 64, 5, 1, 2, 130)


@dataclass
class Drawn:
    """A cache of sequences of `lengths` tokens, and the next `new` of each: q, gates and the six keys and values."""

    cache: PagedCache
    slots: Tensor
    q: Tensor
    gates: Tensor
    new: list[Tensor]
    sizes: DecodeSizes

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Drawn":
        """A copy of its own; tables of numbers, and pages in 8 bits, as they are."""

        def put(x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                return x
            is_wide = x.is_floating_point() and x.itemsize > 1
            return x.clone().to(device, dtype) if is_wide else x.clone().to(device)

        cache = PagedCache(*map(put, self.cache))
        new = [put(x) for x in self.new]
        return Drawn(cache, put(self.slots), put(self.q), put(self.gates), new, self.sizes)

    def in_fp8(self, k_scale: float, v_scale: float) -> "Drawn":
        """The same with pages in e4m3."""
        pages = {
            name: in_pages(x, k_scale if name[0] == "k" else v_scale, torch.float8_e4m3fn)
            for name, x in zip(self.cache._fields[:4], self.cache, strict=False)
        }
        return replace(self, cache=self.cache._replace(**pages, k_scale=k_scale, v_scale=v_scale))

    def decode(self, ops, phis: tuple | None = None, turns: tuple | None = None) -> tuple[Tensor, Tensor]:
        """The steps with the functions of `ops`; phi is an MLP of the weights of `phis`, or the mean, which with
        `turns` is the one of `ops`."""
        appended = ops.decode_append(*self.new, self.cache, self.slots, sizes=self.sizes)
        if phis:
            ops.decode_compress_mlp(appended, self.cache, *phis, *(turns or ()))
        elif turns:
            ops.decode_compress_mean(appended, self.cache, *turns)
        else:
            blocks = [x.unflatten(0, (-1, self.sizes.cmp_block_len)) for x in (appended.k_raw, appended.v_raw)]
            ops.decode_store(*(x.mean(1) for x in blocks), appended, self.cache)
        return ops.decode_attention(
            self.q, self.gates, appended, self.cache, self.slots, sizes=self.sizes, softmax_scale=self.scale
        )


def draw(
    lengths: list[int | None], new: int, heads: tuple[int, int, int, int], sizes: DecodeSizes = PAPER,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0, max_pages: int | None = None, std: float = 1.0,
) -> Drawn:  # fmt: skip
    """lengths      tokens of each sequence before the new ones; None: an empty slot
    heads           Hq, Hkv, Dk, Dv
    max_pages       width of the page table; None: as the longest needs

    Values are rounded to `dtype`, and held in fp64.
    """
    gen = torch.Generator().manual_seed(seed)
    num_q_heads, num_heads, *dims = heads

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=gen) * std).to(dtype).double()

    num_slots, length, per_page = len(lengths) + 2, sizes.slc_block_len, sizes.cells_slc
    counts = [0 if n is None else -(-(n + new) // length) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=gen).to(torch.int32)
    rings = sizes.window_len + 8, sizes.cmp_block_len + 8
    shapes = [(len(order), length), (len(order), per_page), *((num_slots, ring) for ring in rings)]
    tensors = [torch.full((*s, num_heads, d), math.nan, dtype=torch.float64) for s in shapes for d in dims]
    table = torch.full((num_slots, max_pages or max(1, *counts)), 2**30, dtype=torch.int32)
    held = torch.zeros(num_slots, dtype=torch.int32)
    slots = torch.randperm(num_slots, generator=gen)[: len(lengths)].to(torch.int32)
    cache = PagedCache(*tensors, table, held)
    taken = 0
    for b, count in enumerate(counts):
        slot, tokens = int(slots[b]), lengths[b]
        if tokens is None:
            slots[b] = -1
            continue
        table[slot, :count] = order[taken : taken + count]
        taken += count
        held[slot] = tokens
        for which, x in enumerate(tensors):
            _fill(x, table[slot].long(), slot, which // 2, tokens, sizes, normal(tokens, num_heads, dims[which % 2]))
    batch = (len(lengths), new)
    kv = [normal(*batch, num_heads, dim) for dim in dims * 3]
    q, gates = (
        normal(*batch, num_q_heads, dims[0]),
        torch.rand(*batch, num_q_heads, 3, generator=gen).to(dtype).double(),
    )
    return Drawn(cache, slots, q, gates, kv, sizes)


def _fill(x: Tensor, pages: Tensor, slot: int, kind: int, tokens: int, sizes: DecodeSizes, values: Tensor) -> None:
    """Kinds: pages of tokens, pages of compressed blocks, rings."""
    if kind == 0:
        at = torch.arange(tokens)
        x[pages[at // sizes.slc_block_len], at % sizes.slc_block_len] = values
    elif kind == 1:
        cell = torch.arange(num_whole(tokens, sizes)) + sizes.cells_cmp - 1
        x[pages[cell // sizes.cells_slc], cell % sizes.cells_slc] = values[: len(cell)]
    else:
        at = torch.arange(max(0, tokens - x.shape[1]), tokens)
        x[slot, at % x.shape[1]] = values[at]
