"""Compiles every Gluon kernel for a Hopper GPU with the triton that is here, without a GPU; prints their names.

A launch compiles and does not run: the driver is a stand-in, and tensors are on the CPU. A process of its own, as the
tests beside it run in triton's interpreter.
"""

import sys
from types import SimpleNamespace

import torch
import triton
from parameters import check_parameters
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 232448  # bytes that a program may have
compiled: set[str] = set()


class _Driver:
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY})

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def _compile(kernel: JITFunction, grid):
    def launch(*args, **options):
        if isinstance(kernel, GluonJITFunction):
            made = kernel.warmup(*args, grid=grid, **options)
            check_parameters(made, kernel, args, options)
            shared = made.metadata.shared
            assert shared <= SHARED_MEMORY, f"{kernel.fn.__name__} needs {shared} bytes of shared memory"
            compiled.add(f"{kernel.fn.__module__.removeprefix('nsa_kernels.')}.{kernel.fn.__name__}")

    return launch


def compile_all(group: int, remote: bool, dim_k: int, dim_v: int) -> None:
    from nsa_kernels.interval import hopper_forward, hopper_grad_kv, hopper_grad_q
    from nsa_kernels.selected.hopper.backward import launch_items
    from nsa_kernels.selected.hopper.forward_gathered import attend_gathered
    from nsa_kernels.selected.hopper.forward_shared import attend_shared_and_sum
    from nsa_kernels.selected.index import build_block_index
    from nsa_kernels.selection import hopper_importance

    num_tokens, heads, num_slots = 256, 2, 16
    q = torch.zeros(num_tokens, heads * group, dim_k, dtype=torch.bfloat16)
    k, v = q[:, :heads].contiguous(), q[:, :heads, :dim_v].contiguous()
    begin = torch.zeros(num_tokens, dtype=torch.int32)
    end, lse, out = begin + 1, q[..., 0].float(), q[..., :dim_v].contiguous()
    statistics = torch.zeros(3, heads, num_tokens * group)
    hopper_forward.attend(q, k, v, begin, end, out, lse, 0.1)
    hopper_forward.attend(q, k, v, begin, end, out, lse, 0.1, key_tile=64, unseen=begin[:4])
    spans = begin[:2]
    hopper_forward.attend(q, k, v, begin, end, out, lse, 0.1, key_tile=64, unseen=begin[:4], spans=spans)
    hopper_grad_q.grad_q(q, k, v, begin, end, statistics, out, 0.1)
    hopper_grad_q.grad_q(q, k, v, begin, end, statistics, out, 0.1, unseen=begin[:4])
    hopper_grad_q.grad_q(q, k, v, begin, end, statistics, out, 0.1, unseen=begin[:4], spans=spans)
    hopper_grad_kv.grad_kv(q, k, v, begin, end, statistics, out, 0.1)
    boxes, buffer = hopper_importance.boxes_of_blocks(k[:15], 4), torch.zeros(heads, num_tokens, 2, 4)
    hopper_importance.importance(
        q, boxes, lse, begin, end, buffer, 0, num_tokens, softmax_scale=0.1, cells_cmp=2, cells_slc=4
    )

    k_pages, v_pages = (torch.zeros(2, 64, dim, dtype=torch.bfloat16) if remote else None for dim in (dim_k, dim_v))
    table, ids = torch.zeros(heads, 4, dtype=torch.int32), torch.zeros(num_tokens, heads, num_slots, dtype=torch.int32)
    position = torch.arange(num_tokens)
    index = build_block_index(
        ids, position, num_blocks=4, slc_block_len=64, item_queries=16, segment_queries=256, gather_all=False
    )
    part = torch.zeros(heads, num_tokens, num_slots, group, dim_v, dtype=torch.float16)
    scale, part_lse = part[..., 0].float(), part[..., 0].float()
    sizes = {"head_start": 0, "slc_block_len": 64, "scale_log2": 0.1}
    attend_gathered(q, k, v, k_pages, v_pages, table, index, part, scale, part_lse, **sizes)
    attend_shared_and_sum(q, k, v, k_pages, v_pages, table, ids, position, part, scale, part_lse, out, lse, **sizes)
    rows, dkv_part = torch.zeros(4, *lse.shape), torch.zeros(index.max_items, 64, dim_k + dim_v)
    dq_part = torch.zeros(heads, num_tokens, num_slots, group, dim_k, dtype=torch.float16)
    launch_items(
        q, k, v, k_pages, v_pages, out, rows, table, index, dq_part, scale, dkv_part, head_start=0, softmax_scale=0.1
    )  # fmt: skip


CASES = [(8, True, 128, 128), (16, False, 192, 128)]
SLOW_CASES = [(16, False, 128, 128), (64, True, 192, 128), (8, False, 64, 64)]

if __name__ == "__main__":
    triton.runtime.driver.set_active(_Driver())
    JITFunction.__getitem__ = _compile
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    for case in SLOW_CASES if sys.argv[1:] == ["slow"] else CASES:
        compile_all(*case)
    print(*sorted(compiled))
