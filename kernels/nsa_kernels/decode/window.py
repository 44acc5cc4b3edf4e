"""Window attention of a new token, from the ring of its sequence; the newest from what was given.

A program takes `part_blocks` times l' tokens of the window, counted from its first, and leaves m, sum and out as
`compressed` does; one that begins past the window's end leaves nothing, and nothing of it is read.

Shapes
    max, sum    fp32 [B, new, Hq, parts]        out     fp32 [B, new, Hq, parts, Dv]
Source      Yuan et al. 2025, arXiv:2502.11089, section 3.3.3
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.decode.online import attend, load_queries


class Parts(NamedTuple):
    """What programs that share the keys of a query leave."""

    maximum: Tensor
    total: Tensor
    out: Tensor

    @classmethod
    def empty(cls, rows: tuple[int, ...], num_parts: int, dim_v: int, like: Tensor) -> "Parts":
        shapes = (*rows, num_parts), (*rows, num_parts), (*rows, num_parts, dim_v)
        return cls(*(like.new_empty(shape, dtype=torch.float32) for shape in shapes))


@triton.jit
def window_part(
    q_ptr, k_new_ptr, v_new_ptr, k_ring_ptr, v_ring_ptr, max_ptr, sum_ptr, out_ptr,
    query, head, part, slot, length, new_from, new, num_heads, ring, num_parts, scale, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh,
    G: tl.constexpr, G_PAD: tl.constexpr, SLC_LEN: tl.constexpr, WINDOW: tl.constexpr, PART_BLOCKS: tl.constexpr,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """query: sequence * new + token. Tokens from `new_from` on are read where they were given."""
    position = length + (query % new).to(tl.int32)
    win_first = tl.maximum(position - (WINDOW - 1), 0)
    g = tl.arange(0, G_PAD)
    q_rows = q_ptr + query * stride_qt + (head * G + tl.minimum(g, G - 1))[:, None] * stride_qh
    q_a, q_b = load_queries(q_rows, DK_A, DK_B)
    in_block = tl.arange(0, SLC_LEN)
    m = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV], tl.float32)
    first = win_first + part * (PART_BLOCKS * SLC_LEN)
    for start in tl.range(first, tl.minimum(first + PART_BLOCKS * SLC_LEN, position + 1), SLC_LEN):
        token = start + in_block
        there = token <= position
        is_new = token >= new_from
        fresh = query // new * new + token - length
        at = (slot * ring + token % ring) * num_heads + head
        k_rows = tl.where(
            is_new, k_new_ptr + fresh * stride_kt + head * stride_kh, k_ring_ptr + at * (DK_A + DK_B)
        )  # fmt: skip
        v_rows = tl.where(is_new, v_new_ptr + fresh * stride_vt + head * stride_vh, v_ring_ptr + at * DV)
        m, total, acc, _ = attend(
            q_a, q_b, k_rows, v_rows, there, there[None, :], scale, m, total, acc, DK_A, DK_B, DV, PRECISION
        )
    if first <= position:
        live = g < G
        to = ((query * num_heads + head) * G + g) * num_parts + part
        tl.store(max_ptr + to, m, mask=live)
        tl.store(sum_ptr + to, total, mask=live)
        tl.store(out_ptr + to[:, None] * DV + tl.arange(0, DV)[None, :], acc, mask=live[:, None])
