"""The launch of the work items of the selected backward on Hopper: in one role, or in two for wide keys."""

from torch import Tensor

from nsa_kernels.selected.forward import LOG2E
from nsa_kernels.selected.hopper.backward_items import items_kernel
from nsa_kernels.selected.hopper.backward_roles import roles_kernel
from nsa_kernels.selected.hopper.pages import boxes
from nsa_kernels.selected.index import BlockIndex
from nsa_kernels.selected.pages import page_strides


def launch_items(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
    grad_out: Tensor,
    rows: Tensor,
    block_table: Tensor,
    index: BlockIndex,
    dq_part: Tensor,
    dq_scale: Tensor,
    dkv_part: Tensor,
    *,
    head_start: int,
    softmax_scale: float,
) -> None:
    """As `backward_items.launch_items`, for what `tiles.hopper_takes`."""
    num_heads, num_queries, num_slots, group, dim_k = dq_part.shape
    kernel, options = items_kernel, {"WIDTH": dim_k, "maxnreg": 128}
    if dim_k > 128:
        kernel, options = roles_kernel, {"STAGES": 4}
    kernel[(index.max_items,)](
        boxes(q, group), boxes(grad_out, group), boxes(dq_part.view(-1, group, dim_k), group),
        k, v, k_remote, v_remote, rows,
        block_table, index.entries, index.offsets, index.item_offsets, index.item_list,
        dq_scale, dkv_part,
        softmax_scale, softmax_scale * LOG2E, num_queries, num_heads, q.shape[1], index.num_lists,
        block_table.shape[1], head_start, k.shape[0] // dkv_part.shape[1], block_table.stride(0), rows.stride(0),
        *page_strides(k, k_remote), *page_strides(v, v_remote),
        SLOTS=num_slots, GROUP=group, HAS_REMOTE=k_remote is not None, ITEM_QUERIES=index.item_queries, num_warps=4,
        **options,
    )  # fmt: skip
