"""What ranks read of each other, counted when somebody asks: the device knows it, and nobody waits for it before."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_dist.cp.call import Call
from nsa_dist.cp.one_sided.tables import reader_tables


def count_read(
    marks: Sequence[Tensor], head_dims: tuple[int, int], dtype: torch.dtype, call: Call, *kinds: str
) -> None:
    """Owe the traffic the remote pages of `marks`, by kind; of `pages` in a forward also u. Not in a CUDA graph.

    kinds       `pages` in `dtype`, `pages.grad` in that of sums
    """
    if marks[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    traffic, remote = call.comm.traffic, reader_tables(call.layout).blocks.remote
    numbers, wide = call.cfg.slc_block_len * sum(head_dims), torch.promote_types(dtype, torch.float32)
    page_bytes = {"pages": numbers * dtype.itemsize, "pages.grad": numbers * wide.itemsize}

    def count() -> None:
        chosen = torch.cat([x.index_select(1, remote) for x in marks]).sum(1).tolist()
        for kind in kinds:
            traffic.add(kind, sum(chosen) * page_bytes[kind])
        if "pages.grad" not in kinds:
            traffic.count_union(torch.tensor(chosen), len(remote))

    traffic.owe(count)
