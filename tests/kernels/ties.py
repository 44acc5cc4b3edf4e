"""Block selection compared with the reference's: the same blocks, or a tie within the rounding of fp32."""

import torch

from nsa_kernels import reference
from nsa_kernels.selection.select import select_blocks

# Relative to the importances compared: the rounding of an fp32 score of size 40 and of its exponential.
TIE = 2e-5


def importance(arguments, sizes):
    """fp64 importance [T, Hkv, J] of every block of the query's document, by eq. 9 and 10 as they are written."""
    q, k, lse, begin, end, position, _ = (t.cpu() for t in arguments)
    weights = reference.overlap_weights(sizes["cmp_block_len"], sizes["cmp_stride"], sizes["slc_block_len"])
    num_kv_heads, per_block = k.shape[1], sizes["slc_block_len"] // sizes["cmp_stride"]
    result = torch.zeros(len(q), num_kv_heads, int(position.max()) // sizes["slc_block_len"] + 1, dtype=torch.float64)
    for t in range(len(q)):
        keys = k[begin[t] : end[t]].double().repeat_interleave(q.shape[1] // num_kv_heads, 1)
        p = torch.exp(torch.einsum("hd,ihd->hi", q[t].double(), keys) * sizes["softmax_scale"] - lse[t, :, None])
        p = p.unflatten(0, (num_kv_heads, -1)).sum(1)  # [Hkv, keys]
        for j in range(result.shape[2]):
            for offset, weight in weights.items():
                if 0 <= j * per_block + offset < p.shape[1]:
                    result[t, :, j] += weight * p[:, j * per_block + offset]
    return result


def assert_same_but_for_ties(arguments, sizes, actual=None):
    """Returns how many (query, head) rows of `actual`, or of the kernel, differ from the reference, all by ties."""
    q, k, *rows = arguments
    actual = select_blocks(*arguments, **sizes) if actual is None else actual
    expected = reference.select_blocks(*arguments, **sizes)
    assert actual.dtype == torch.int32
    assert actual.shape == expected.shape
    differing = (actual != expected).any(-1).nonzero().tolist()
    for t, head in differing:
        imp = importance((q[t : t + 1], k, *(x[t : t + 1] for x in rows)), sizes)[0, head]
        first = int(arguments[6][t]) // sizes["slc_block_len"]
        mine, theirs = ({int(b) for b in x[t, head] if b >= 0} for x in (actual, expected))
        assert len(mine) == len(theirs)
        ahead = max(float(imp[b - first]) for b in theirs - mine)
        taken = min(float(imp[b - first]) for b in mine - theirs)
        assert ahead - taken <= TIE * ahead, f"query {t}, head {head} chose {taken} over {ahead}"
    return len(differing)
