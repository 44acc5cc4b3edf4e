"""Which n blocks every query attends to: importance streamed from compressed scores, then the top n (section 3.3.2).

    imp[t, h, j] = sum_i w(i - j * S) * sum_g exp(softmax_scale * q[t, h*G + g] . k_cmp[i, h] - lse[t, h*G + g])

over the compressed blocks i that query t sees (eq. 8 to 10), where S = l' / d and w counts the stride-sized cells that
compressed block i shares with selection block j. Both are counted from the query's document: compressed block i is
row cmp_begin[t] + i of k_cmp.

Two kernels take turns on a chunk of queries, over one buffer of at most MAX_BUFFER_BYTES:
1. `importance`, or `hopper_importance` on Hopper GPUs: a tile of (queries x G heads) against compressed keys,
   probabilities in registers, weighed and added up over the S keys of a block and over the group. Keys i of block
   j = i // S also touch blocks j + 1, j + 2, ...: layer `o` of the buffer holds at [o, j] what the keys of block j give
   to block j + o. (l/d, S) = (2, 4) has two layers.
2. The top n of `sum_o buffer[o, j - o]`: one int64 per block, the bits of its importance above those of ~j, so that
   sorting integers prefers larger importance, then the lower index.

Example     l, d, l' = 32, 16, 64 and p = 1 everywhere on 8 compressed blocks: layer 0 holds 7, 7 (weights 2, 2, 2, 1),
            layer 1 holds 1, 1 (the last key of a block reaches into the next), so imp = 7, 8.
Shapes      T = query tokens here, M = compressed blocks of the whole sequence, n = num_slc_blocks
    q [T, Hq, Dk], k_cmp [M, Hkv, Dk]   bf16, fp16 or fp32      lse_cmp fp32 [T, Hq]      cmp_begin, cmp_end int32 [T]
    position, doc_start     int32 or int64 [T], in the padded stream; position < doc_start: padding, which chooses none
    returns                 int32 [T, Hkv, n], global block ids, ascending, -1 for none
Numerics    products of bf16 are exact in fp32; everything after the tensor cores is fp32. What a query chooses does not
            depend on the queries beside it.
Work        2 * Dk FLOP and one exp2 a visible (query, head, key)
Reference   nsa_kernels.reference.select_blocks
Source      Yuan et al. 2025, arXiv:2502.11089, eq. 8 to 12
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_kernels import contracts
from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.limits import check_selection
from nsa_kernels.common.rows import unit_stride
from nsa_kernels.common.sizes import cdiv
from nsa_kernels.common.tiles import copyable_by_tma
from nsa_kernels.contracts import SelectionCall, meets
from nsa_kernels.selection import hopper_importance
from nsa_kernels.selection.importance import importance
from nsa_kernels.selection.top import choose_top

MAX_BUFFER_BYTES = 2**28
MIN_PAIRS_ON_HOPPER = 2**26  # (query, key) pairs from which the Gluon kernel wins: 32,768 tokens


@meets(contracts.select_blocks)
@torch.no_grad()
def select_blocks(call: SelectionCall) -> Tensor:
    check_selection(call)
    begin, end, position, doc_start = (x.contiguous() for x in call[3:7])
    call = call._replace(cmp_begin=begin, cmp_end=end, position=position, doc_start=doc_start)
    q, k_cmp, lse_cmp = call[:3]
    num_queries = q.shape[0]
    num_keys, num_kv_heads = k_cmp.shape[:2]
    cells_cmp, cells_slc = call.cmp_block_len // call.cmp_stride, call.slc_block_len // call.cmp_stride
    num_layers = 1 + cdiv(cells_cmp - 1, cells_slc)
    num_blocks = cdiv(num_keys, cells_slc)

    keys = unit_stride(k_cmp)
    fill: Callable[..., None] = importance
    if _large_on_hopper(q, k_cmp, cells_slc):
        keys, fill = hopper_importance.boxes_of_blocks(k_cmp, cells_slc), hopper_importance.importance
    q = copyable_by_tma(q)
    row_bytes = 4 * num_kv_heads * num_layers * max(1, num_blocks)
    chunk_len = max(1, MAX_BUFFER_BYTES // row_bytes)
    chunk_len = min(num_queries, chunk_len // 128 * 128 or chunk_len)  # whole tiles of queries, if there is room
    buffer = q.new_empty(num_kv_heads, chunk_len, num_layers, num_blocks, dtype=torch.float32)
    out = torch.empty(num_queries, num_kv_heads, call.num_slc_blocks, dtype=torch.int32, device=q.device)
    for first in range(0, num_queries, max(1, chunk_len)):
        last = min(first + chunk_len, num_queries)
        if num_keys:
            fill(
                q, keys, lse_cmp, begin, end, buffer, first, last,
                softmax_scale=call.softmax_scale, cells_cmp=cells_cmp, cells_slc=cells_slc,
            )  # fmt: skip
        choose_top(call, buffer, out, first, last)
    return out


def _large_on_hopper(q: Tensor, k_cmp: Tensor, cells_slc: int) -> bool:
    """Whether the Gluon kernel takes these and is faster; the bits are the same either way.

    H200, bf16, Hq 64, Hkv 4, D 128, ms of the importances: 64k tokens 4.1 against 5.9, 8k tokens, with an older form,
    0.40 against 0.16. Other groups were not timed. Fewer than 4 keys to a block need more shared memory than there is.
    """
    is_large = q.shape[0] * k_cmp.shape[0] >= MIN_PAIRS_ON_HOPPER and q.shape[1] // k_cmp.shape[1] >= 8
    return is_large and cells_slc in (4, 8, 16) and hopper_takes(q, k_cmp)
