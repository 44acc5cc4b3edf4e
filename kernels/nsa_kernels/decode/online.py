"""A step of attention with a running maximum, which the launches of decoding share: in powers of 2.

Source      Milakov & Gimelshein 2018, arXiv:1805.02867
"""

import triton
import triton.language as tl


@triton.jit
def load_queries(q_rows, DK_A: tl.constexpr, DK_B: tl.constexpr):
    """Both parts of rows [M, 1] of the head dim; the first again where it has one."""
    q_a = tl.load(q_rows + tl.arange(0, DK_A)[None, :])
    q_b = q_a
    if DK_B:
        q_b = tl.load(q_rows + DK_A + tl.arange(0, DK_B)[None, :])
    return q_a, q_b


@triton.jit
def scores(
    q_a, q_b, k_rows, there, seen, scale, DK_A: tl.constexpr, DK_B: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """q . k [M, N] of the keys of rows [N], times scale; -inf where a query does not see one."""
    k = tl.load(k_rows[:, None] + tl.arange(0, DK_A)[None, :], mask=there[:, None], other=0.0)
    s = tl.dot(q_a, tl.trans(k.to(q_a.dtype)), input_precision=PRECISION)
    if DK_B:
        k = tl.load(k_rows[:, None] + DK_A + tl.arange(0, DK_B)[None, :], mask=there[:, None], other=0.0)
        s = tl.dot(q_b, tl.trans(k.to(q_a.dtype)), s, input_precision=PRECISION)
    return tl.where(seen, s * scale, float("-inf"))


@triton.jit
def with_parts(m, total, acc, part_max, part_sum, outs):
    """m, total [1] and acc [DV] with further parts of one row: maxima and sums [N], outs [N, DV]."""
    m_new = tl.maximum(m, tl.max(part_max, 0))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weight = tl.exp2(part_max - base)
    alpha = tl.exp2(m - base)
    acc = acc * alpha + tl.sum(outs * weight[:, None], 0)
    return m_new, total * alpha + tl.sum(part_sum * weight, 0), acc


@triton.jit
def attend(
    q_a, q_b, k_rows, v_rows, there, seen, scale, m, total, acc,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """m, total [M] and acc [M, DV] with the keys and values of rows [N], and p [M, N] = 2 ** (score - m).

    Keys and values in 8 bits enter the products in the dtype of the queries; scales are the caller's.

    there       [N]: rows that are read         seen        [M, N]: those of them that each query sees
    """
    s = scores(q_a, q_b, k_rows, there, seen, scale, DK_A, DK_B, PRECISION)
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    v = tl.load(v_rows[:, None] + tl.arange(0, DV)[None, :], mask=there[:, None], other=0.0)
    acc = tl.dot(p.to(q_a.dtype), v.to(q_a.dtype), acc * alpha[:, None], input_precision=PRECISION)
    return m_new, total * alpha + tl.sum(p, 1), acc, p
