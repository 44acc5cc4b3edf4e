"""What the Gluon kernels for Hopper share: barriers, tiles for the copy engine, and when they can be used."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_kernels.common.device import on_hopper
from nsa_kernels.common.sizes import split_head_dim

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name in triton 3.6, and from 3.7 on

# Of tiles whose last dim is 64 or 128 16-bit numbers, as tensor cores read them; by the number of their dims.
_TILES = {rank: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank) for rank in (3, 4)}
_NUMBERS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@gluon.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@gluon.jit
def uniform(x):
    """`x`, the same in every lane, so that the compiler knows: addresses made of it stay in uniform registers."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def new_barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers [NUMBER], each of which completes its phase after ARRIVALS."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def tile(smem, index, ROWS: gl.constexpr):
    """Slot `index` of `smem` as a matrix [ROWS, columns]."""
    return smem.index(index).reshape([ROWS, smem.shape[smem.rank - 1]])


@gluon.jit
def copy_rows(desc, tail_desc, row, head, barrier, smem, tail_smem, index):
    """Rows of a head, all their columns, into slot `index`."""
    tma.async_copy_global_to_shared(desc, [row, head, 0], barrier, smem.index(index))
    if tail_desc is not None:
        tma.async_copy_global_to_shared(tail_desc, [row, head, smem.shape[3]], barrier, tail_smem.index(index))


@gluon.jit
def dot(a, a_tail, b, b_tail, nothing, TAIL: gl.constexpr):
    """a b^T over all columns, those of the tails included; on its way."""
    s = warpgroup_mma(a, b.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if TAIL:
        s = warpgroup_mma(a_tail, b_tail.permute((1, 0)), s, is_async=True)
    return s


def descriptors(x: Tensor, block: tuple[int, ...]) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Tiles of `x`, `block` rows of them: a power of two of columns, and the rest (192 = 128 + 64) or None."""
    first, rest = split_head_dim(x.shape[-1])
    return descriptor(x, (*block, first)), descriptor(x, (*block, rest)) if rest else None


def descriptor(x: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Tiles of `x`, 16-bit in 3 or 4 dims or fp32 in one; what lies past its end reads as 0 and is not written."""
    layout = _NUMBERS if x.dim() == 1 else _TILES[x.dim()]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), layout)


def hopper_takes(q: Tensor, k: Tensor, aligned: bool | None = None) -> bool:
    """A Hopper GPU, 16-bit inputs, Dk of 64, 128 or 192, whole groups in the 64 rows of four warps.

    aligned     False: documents share tiles, which these kernels do not keep apart (`wild`)
    """
    return (
        aligned is not False
        and on_hopper(q)
        and q.element_size() == 2
        and q.shape[2] in (64, 128, 192)
        and 64 % (q.shape[1] // k.shape[1]) == 0
    )
