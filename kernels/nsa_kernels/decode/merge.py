"""The splits of the compressed branch and the parts of the window merged in ascending order, and their gates.

    out_b = (sum_s 2 ** (m_s - M) * out_s) / (sum_s 2 ** (m_s - M) * sum_s)       M = max of the m_s of the branch

A branch without keys is 0.

Source      Milakov & Gimelshein 2018, arXiv:1805.02867, section 3.1
"""

import triton
import triton.language as tl

from nsa_kernels.decode.online import with_parts


@triton.jit
def merged(max_ptr, sum_ptr, out_ptr, row, num_used, NUM_PARTS: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr):
    """out [DV] of a row of [.., NUM_PARTS], the first `num_used` of which are there; PARTS at once, all loads of which
    are under way together."""
    dim = tl.arange(0, DV)[None, :]
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DV], tl.float32)
    for first in tl.static_range(0, NUM_PARTS, PARTS):
        index = first + tl.arange(0, PARTS)
        part = row * NUM_PARTS + index
        used = index < num_used
        part_max = tl.load(max_ptr + part, mask=used, other=float("-inf"))
        part_sum = tl.load(sum_ptr + part, mask=used, other=0.0)
        outs = tl.load(out_ptr + part[:, None] * DV + dim, mask=used[:, None], other=0.0)
        m, total, acc = with_parts(m, total, acc, part_max, part_sum, outs)
    return acc / tl.where(total > 0, total, 1.0)
