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
def attend(
    q_a, q_b, k_rows, v_rows, there, seen, scale, m, total, acc,
    DK_A: tl.constexpr, DK_B: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """m, total [M] and acc [M, DV] with the keys and values of rows [N], and p [M, N] = 2 ** (score - m).

    Keys and values in 8 bits enter the products in the dtype of the queries; scales are the caller's.

    there       [N]: rows that are read         seen        [M, N]: those of them that each query sees
    """
    k = tl.load(k_rows[:, None] + tl.arange(0, DK_A)[None, :], mask=there[:, None], other=0.0)
    s = tl.dot(q_a, tl.trans(k.to(q_a.dtype)), input_precision=PRECISION)
    if DK_B:
        k = tl.load(k_rows[:, None] + DK_A + tl.arange(0, DK_B)[None, :], mask=there[:, None], other=0.0)
        s = tl.dot(q_b, tl.trans(k.to(q_a.dtype)), s, input_precision=PRECISION)
    s = tl.where(seen, s * scale, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - base[:, None])
    alpha = tl.exp2(m - base)
    v = tl.load(v_rows[:, None] + tl.arange(0, DV)[None, :], mask=there[:, None], other=0.0)
    acc = tl.dot(p.to(q_a.dtype), v.to(q_a.dtype), acc * alpha[:, None], input_precision=PRECISION)
    return m_new, total * alpha + tl.sum(p, 1), acc, p
