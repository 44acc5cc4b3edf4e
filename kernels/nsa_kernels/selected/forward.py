"""Selected attention, forward: blocks wait for the queries that chose them, then every query adds up its parts.

1. `gathered`, one work item of the index at a time. A block's keys and values are loaded once and meet the queries that
   chose it, the G heads of each as G tile rows, so tiles are full at any G. Each (query, block) pair leaves its own
   normalised output and log-sum-exp, a *part*, in the slot of the query: nothing is summed across queries or programs.
2. `shared`, one tile of consecutive queries at a time. Each row's first block, its own and the one before, which
   neighbours have in common, make one part, in slot 0; and the log-sum-exps of all parts become their weights.
3. `parts.sum_parts`: the weighted sum of each row's parts, in the order of its list.

So a query's bits depend on its own list of blocks only: not on its tile neighbours, not on page numbers.
Where `tiles.hopper_takes` says so, kernels in Gluon do the same: `hopper.forward_gathered` the first step, and
`hopper.forward_shared` the others in one, so that the shared blocks' part stays in registers.

Shapes      T = query tokens of this chunk, n = slots, G = query heads per key-value head, H = key-value heads of it
    part        [H, T, n, G, Dv]    fp16 for 16-bit inputs, fp32 for fp32, over its largest |element|
    scale       [H, T, n, G]        fp32: what to multiply a part with; `shared` turns it into the part's weight
    part_lse    [H, T, n, G]        fp32, log2 of the sum of exponentials
Numerics    scores, softmax statistics and sums in fp32; the probabilities meet the values in the dtype of q.
"""

import torch
from torch import Tensor

from nsa_kernels.contracts import SelectedCall
from nsa_kernels.selected import (
    forward_gathered,
    forward_shared,
)
from nsa_kernels.selected.hopper import forward_gathered as hopper_gathered
from nsa_kernels.selected.hopper import forward_shared as hopper_shared
from nsa_kernels.selected.index import BlockIndex
from nsa_kernels.selected.tiles import hopper_takes

LOG2E = 1.4426950408889634


def attend_chunk(call: SelectedCall, index: BlockIndex, out: Tensor, lse: Tensor, *, head_start: int) -> None:
    """Fill `out` [T, Hq, Dv] and `lse` [T, Hq] for a chunk of queries and the heads the index was built for.

    All tensors but pages and table are the chunk's rows, with all heads; `index` holds heads head_start onwards.
    """
    q, k, v, k_remote, v_remote, block_indices, block_table, position, slc_block_len, softmax_scale = call
    num_queries, num_slots = block_indices.shape[0], block_indices.shape[2]
    num_blocks, num_kv_heads = block_table.shape[1], k.shape[1]
    num_heads = index.num_lists // (index.num_segments * num_blocks)
    group, head_dim_v = q.shape[1] // num_kv_heads, v.shape[2]
    exact = q.dtype == torch.float32
    part_shape = (num_heads, num_queries, num_slots, group)
    part = torch.empty(*part_shape, head_dim_v, dtype=torch.float32 if exact else torch.float16, device=q.device)
    scale, part_lse = (torch.empty(part_shape, dtype=torch.float32, device=q.device) for _ in range(2))

    gather, finish = forward_gathered.attend_gathered, forward_shared.attend_shared_and_sum
    if hopper_takes(q, k, v, block_indices, slc_block_len, (q,)):
        gather, finish = hopper_gathered.attend_gathered, hopper_shared.attend_shared_and_sum
    scale_log2 = softmax_scale * LOG2E
    gather(
        q, k, v, k_remote, v_remote, block_table, index, part, scale, part_lse,
        head_start=head_start, slc_block_len=slc_block_len, scale_log2=scale_log2,
    )  # fmt: skip
    finish(
        q, k, v, k_remote, v_remote, block_table, block_indices, position, part, scale, part_lse, out, lse,
        head_start=head_start, slc_block_len=slc_block_len, scale_log2=scale_log2,
    )  # fmt: skip
