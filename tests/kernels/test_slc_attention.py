"""Selected attention against the fp64 reference: every gradient, remote pages, any selection, the same bits."""

from dataclasses import dataclass, replace

import pytest
import torch
from kernels.judge import assert_twice
from nsa_kernels import reference
from nsa_kernels.slc_attention import selected_attention
from nsa_kernels.slc_index import build_block_index
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEN = 16


@dataclass
class Case:
    """What one rank holds: queries at `position`, some blocks as local pages, the other chosen ones as remote pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor
    block_table: Tensor
    position: Tensor
    packed: Tensor | None = None  # [pages, l', Dk + Dv]

    @property
    def dims(self):
        return self.q.shape[2], self.v.shape[2]

    def leaves(self, dtype=None):
        tensors = [self.q, self.k, self.v] + ([] if self.packed is None else [self.packed])
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def random_selection(position, num_kv_heads, slots, block_len=LEN):
    """Forced blocks (first, own, the one before) and uniformly random earlier ones, ascending, -1 last."""
    rows = torch.full((len(position), num_kv_heads, slots), -1, dtype=torch.int32)
    for t, pos in enumerate(position.tolist()):
        own = pos // block_len
        forced = sorted({0, max(own - 1, 0), own}) if pos >= 0 else []
        for h in range(num_kv_heads):
            others = [b for b in torch.randperm(max(own, 0)).tolist() if b not in forced]
            chosen = sorted(forced + others[: slots - len(forced)])[-slots:]
            rows[t, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return rows


def make_case(
    position, selection, *, group=2, num_kv_heads=2, dims=(16, 16), dtype=torch.bfloat16, device="cpu",
    local_blocks=None, block_len=LEN, std=1.0,
):  # fmt: skip
    """Pages in a shuffled order; every page that nobody chose, and a remote page too many, are NaN."""
    position = torch.as_tensor(position)
    num_blocks = int(max(position.max(), 0)) // block_len + 1
    if selection is None:
        selection = random_selection(position, num_kv_heads, 5, block_len)
    local_blocks = list(range(num_blocks)) if local_blocks is None else list(local_blocks)
    dk, dv = dims
    k = torch.randn(len(local_blocks) * block_len, num_kv_heads, dk)
    v = torch.randn(len(local_blocks) * block_len, num_kv_heads, dv)
    table = torch.full((num_kv_heads, num_blocks), -(2**20), dtype=torch.int32)  # what nobody chose points nowhere
    remote = []
    for h in range(num_kv_heads):
        chosen = set(selection[:, h].unique().tolist()) - {-1}
        for page, block in enumerate(local_blocks):
            table[h, block] = page
            if block not in chosen:
                k[page * block_len : (page + 1) * block_len, h] = torch.nan
                v[page * block_len : (page + 1) * block_len, h] = torch.nan
        remote += [(h, block) for block in sorted(chosen - set(local_blocks), reverse=True)]
    for row, (h, block) in enumerate(remote):
        table[h, block] = len(local_blocks) + row
    packed = torch.randn(len(remote) + 1, block_len, dk + dv)
    packed[-1] = torch.nan
    q = torch.randn(len(position), group * num_kv_heads, dk) * std
    tensors = [x.to(dtype).to(device) for x in (q, k, v)]
    selection, table, position = (x.to(device) for x in (selection, table, position))
    return Case(*tensors, selection, table, position, packed.to(dtype).to(device) if remote else None)


def run(attend, case, grad_out, grad_lse, dtype=None, block_len=LEN, **options):
    leaves = case.leaves(dtype)
    remote = {}
    if case.packed is not None:
        dk = case.dims[0]
        remote = {"k_remote": leaves[3][..., :dk], "v_remote": leaves[3][..., dk:]}
    out, lse = attend(
        *leaves[:3], case.block_indices, case.block_table, case.position,
        slc_block_len=block_len, softmax_scale=case.dims[0] ** -0.5, **remote, **options,
    )  # fmt: skip
    seen = lse.detach().isfinite()  # -inf takes no gradient
    grad_lse = grad_lse.to(lse.dtype).masked_fill(~seen, 0)
    grads = torch.autograd.grad((out, lse.masked_fill(~seen, 0)), leaves, (grad_out.to(out.dtype), grad_lse))
    return out.detach(), lse.detach(), *grads


def upstream(case):
    grad_out = torch.randn(*case.q.shape[:2], case.dims[1], device=case.q.device).to(case.q.dtype)
    return grad_out, torch.randn(case.q.shape[:2], device=case.q.device)


def check(case, block_len=LEN, **options):
    grads = upstream(case)
    actual = run(selected_attention, case, *grads, block_len=block_len, **options)
    plain = run(reference.selected_attention, case, *grads, block_len=block_len)
    exact = run(reference.selected_attention, case, *grads, torch.float64, block_len=block_len)
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv", "dremote"), actual, plain, exact, strict=False):
        assert a.dtype == p.dtype
        assert_twice(name, a, p, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "dims"), [(1, 2, (16, 16)), (2, 2, (32, 16)), (4, 1, (48, 32)), (16, 1, (16, 32))]
)
def test_forward_and_gradients(group, num_kv_heads, dims, dtype, device):
    position = torch.arange(5 * LEN + 3)
    check(make_case(position, None, group=group, num_kv_heads=num_kv_heads, dims=dims, dtype=dtype, device=device))
