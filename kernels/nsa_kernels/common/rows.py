"""What kernels that pass over [tokens, heads, dim] tensors row by row share: strides, and tiles of rows."""

from torch import Tensor

from nsa_kernels.common.sizes import cdiv, next_power_of_2


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied if its last stride is not 1: an expanded gradient, say of `out.sum()`, has strides of 0."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_head_strides(*tensors: Tensor) -> tuple[int, ...]:
    """The strides over tokens and heads of each [tokens, heads, dim] tensor, in turn."""
    return tuple(stride for t in tensors for stride in t.stride()[:2])


def row_blocks(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of a pass over the (token, head) rows of `x` [T, H, D]: 4096 elements a program, 32 a thread."""
    block_d = next_power_of_2(x.shape[2])
    block_m = max(1, 4096 // block_d)
    num_rows = x.shape[0] * x.shape[1]
    return (cdiv(num_rows, block_m),), {"DIM": x.shape[2], "BLOCK_D": block_d, "BLOCK_M": block_m}
