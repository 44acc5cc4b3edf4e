"""What the selected-attention kernels can take, and what to do about the rest."""

import torch
from torch import Tensor

from nsa_kernels.selected.pages import split_width

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_table: Tensor,
    position: Tensor,
    slc_block_len: int,
    softmax_scale: float,
    k_remote: Tensor | None,
    v_remote: Tensor | None,
) -> None:
    """Raise ValueError for what the kernels cannot take; the shapes are at the head of `slc_attention`."""
    if q.shape[1] % k.shape[1] or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: the key-value heads must divide "
            f"the query heads, k and v must have the same rows and heads, q and k the same head dim"
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype} must be one of bfloat16, float16, float32, the same for all "
            f"three, because tensor cores take both operands in one dtype; cast them, or use nsa_kernels.reference"
        )
    if slc_block_len < 16 or slc_block_len & (slc_block_len - 1) or k.shape[0] % slc_block_len:
        raise ValueError(
            f"slc_block_len={slc_block_len} must be a power of two from 16 on and divide the {k.shape[0]} rows of k, "
            f"because a page is one tile; pad each document to whole blocks, or use nsa_kernels.reference"
        )
    if not softmax_scale > 0:
        raise ValueError(
            f"softmax_scale={softmax_scale} must be positive, because the largest score is scaled after it is found; "
            f"pass head_dim ** -0.5, or negate q"
        )
    _check_selection(q, k, block_indices, block_table, position)
    _check_remote(q, v, slc_block_len, k_remote, v_remote)
    _check_width("Dk", q.shape[2], two=True)
    _check_width("Dv", v.shape[2], two=False)


def _check_selection(q: Tensor, k: Tensor, block_indices: Tensor, block_table: Tensor, position: Tensor) -> None:
    expected = (q.shape[0], k.shape[1])
    if block_indices.shape[:2] != expected or position.shape != expected[:1] or block_table.shape[0] != expected[1]:
        raise ValueError(
            f"block_indices {tuple(block_indices.shape)}, block_table {tuple(block_table.shape)} and position "
            f"{tuple(position.shape)} must be [T, Hkv, n], [Hkv, num_blocks] and [T] with T={q.shape[0]} and "
            f"Hkv={k.shape[1]}, one row for each query and key-value head; pass them for this rank's tokens"
        )


def _check_remote(q: Tensor, v: Tensor, block_len: int, k_remote: Tensor | None, v_remote: Tensor | None) -> None:
    if k_remote is None and v_remote is None:
        return
    if k_remote is None or v_remote is None:
        raise ValueError(
            f"{'k_remote' if k_remote is None else 'v_remote'} is missing: a page has keys and values, so the kernels "
            f"read both; pass both or neither"
        )
    if k_remote.shape[1:] != (block_len, q.shape[2]) or v_remote.shape != (*k_remote.shape[:2], v.shape[2]):
        raise ValueError(
            f"k_remote {tuple(k_remote.shape)} and v_remote {tuple(v_remote.shape)} must be [pages, {block_len}, D], "
            f"D={q.shape[2]} and {v.shape[2]}, because pages are read like k and v; split the fetched buffer so"
        )


def _check_width(name: str, width: int, *, two: bool) -> None:
    second = split_width(width)[1]
    if width < 16 or (second and (not two or second < 16 or second & (second - 1))):
        what = "a power of two from 16 on" + (" or the sum of two such" if two else "")
        raise ValueError(
            f"{name}={width} must be {what}, because the kernels' tiles are that wide; pad the head dim with zeros, "
            f"or use nsa_kernels.reference"
        )
