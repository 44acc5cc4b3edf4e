"""Selected attention against the fp64 reference: every gradient, remote pages, any selection, the same bits."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.judge import assert_twice
from kernels.pace import SLOW_WITHOUT_A_GPU
from nsa_kernels import reference
from nsa_kernels.selected.attention import selected_attention, selected_attention_backward

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


def dense_plain(
    q, k, v, block_indices, block_table, position, *, slc_block_len, softmax_scale, k_remote=None, v_remote=None
):  # fmt: skip
    """Every operation in the inputs' dtype, all scores at once: the yardstick in 16 bits.

    The reference computes 16-bit inputs in fp32, which no tensor core does: P and dS enter their products rounded.
    """
    group, outs = q.shape[1] // k.shape[1], []
    for h in range(k.shape[1]):
        pages_k, pages_v = (x[:, h].unflatten(0, (-1, slc_block_len)) for x in (k, v))
        if k_remote is not None:
            pages_k, pages_v = torch.cat([pages_k, k_remote]), torch.cat([pages_v, v_remote])
        blocks = block_indices[:, h].unique().long()
        blocks = blocks[blocks >= 0]
        keys, values = (x[block_table[h, blocks].long()].flatten(0, 1) for x in (pages_k, pages_v))
        token = blocks[:, None] * slc_block_len + torch.arange(slc_block_len, device=q.device)
        chosen = (block_indices[:, h, :, None] == blocks).any(1)[..., None] & (token <= position[:, None, None])
        chosen = chosen.flatten(1)[:, None]  # [T, 1, keys]
        scores = q[:, h * group : (h + 1) * group] @ keys.T * softmax_scale  # [T, G, keys]
        empty = ~chosen.any(-1, keepdim=True)
        scores = scores.masked_fill(~chosen, -math.inf).masked_fill(empty, 0.0)
        p = scores.softmax(-1).masked_fill(empty, 0.0)
        outs.append((p @ values, scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)))
    return torch.cat([o for o, _ in outs], 1), torch.cat([lse for _, lse in outs], 1)


def check(case, block_len=LEN, **options):
    grads = upstream(case)
    actual = run(selected_attention, case, *grads, block_len=block_len, **options)
    plain = run(reference.selected_attention, case, *grads, block_len=block_len)
    if case.q.dtype != torch.float32:
        out, _, *gradients = run(dense_plain, case, *grads, block_len=block_len)
        plain = out, plain[1], *gradients
    exact = run(reference.selected_attention, case, *grads, torch.float64, block_len=block_len)
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv", "dremote"), actual, plain, exact, strict=False):
        assert a.dtype == p.dtype
        assert_twice(name, a, p, e)


def segment(first_block, blocks, tokens=None):
    """Positions of one segment of a rank: whole blocks, or the first `tokens` tokens of them and padding rows."""
    position = torch.arange(first_block * LEN, (first_block + blocks) * LEN)
    if tokens is not None:
        position[tokens:] = -1
    return position


SHAPES = [(1, 2, (16, 16)), (2, 2, (32, 16)), (4, 1, (48, 32)), (16, 1, (16, 32))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "num_kv_heads", "dims"), SHAPES)
def test_forward_and_gradients(group, num_kv_heads, dims, dtype, device):
    position = torch.arange(4 * LEN + 3)
    check(make_case(position, None, group=group, num_kv_heads=num_kv_heads, dims=dims, dtype=dtype, device=device))


@pytest.mark.parametrize(("group", "dims"), [(1, (64, 64)), (4, (128, 128)), (3, (192, 128))])
def test_head_dims_of_models(group, dims, device):
    case = make_case(torch.arange(130), None, group=group, num_kv_heads=1, dims=dims, block_len=64, device=device)
    check(case, block_len=64)


@pytest.mark.parametrize(
    ("group", "num_kv_heads", "dims", "dtype"),
    [
        (8, 2, (128, 128), DTYPES[1]),
        pytest.param(16, 2, (128, 128), DTYPES[0], marks=SLOW_WITHOUT_A_GPU),
        pytest.param(64, 1, (128, 128), DTYPES[0], marks=SLOW_WITHOUT_A_GPU),
        pytest.param(8, 2, (192, 128), DTYPES[1], marks=SLOW_WITHOUT_A_GPU),
        pytest.param(16, 2, (192, 128), DTYPES[0], marks=SLOW_WITHOUT_A_GPU),
        pytest.param(64, 1, (192, 128), DTYPES[0], marks=SLOW_WITHOUT_A_GPU),
        pytest.param(8, 2, (64, 64), DTYPES[0], marks=SLOW_WITHOUT_A_GPU),
        pytest.param(32, 1, (64, 64), DTYPES[1], marks=SLOW_WITHOUT_A_GPU),
    ],
)
def test_sizes_of_the_hopper_kernels(group, num_kv_heads, dims, dtype, device):
    """What they take: blocks of 64, wide groups. Padding rows, remote pages, q as a part of a wider tensor."""
    position = torch.cat([torch.arange(6 * 64 + 30, 7 * 64 + 9), torch.full((3,), -1)])
    case = make_case(
        position, None, group=group, num_kv_heads=num_kv_heads, dims=dims, dtype=dtype, device=device,
        local_blocks=[2, 6, 7], block_len=64,
    )  # fmt: skip
    check(
        replace(case, q=torch.cat([case.q, torch.full_like(case.q, torch.nan)], 1)[:, : case.q.shape[1]]), block_len=64
    )


@pytest.mark.parametrize("group", [1, 4])
def test_remote_pages_are_read_in_place(group, device):
    """Two segments of one rank; the blocks between and before them are pages of other ranks, keys beside values."""
    position = torch.cat([segment(2, 1), segment(7, 1)])
    case = make_case(position, None, group=group, dims=(32, 16), local_blocks=[2, 7], device=device)
    assert case.packed is not None
    check(case)


def test_a_remote_page_in_fp32_takes_an_fp32_gradient(device):
    case = make_case(segment(4, 1), None, local_blocks=[4], device=device)
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v, case.packed.float())]
    out, _ = attend_with(selected_attention, case, leaves)
    grad = torch.autograd.grad(out.float().square().sum(), leaves[3])[0]
    leaves[3] = case.packed.detach().requires_grad_()
    out_bf16, _ = attend_with(selected_attention, case, leaves)
    assert torch.equal(out, out_bf16)
    expected = torch.autograd.grad(out_bf16.float().square().sum(), leaves[3])[0]
    assert grad.dtype == torch.float32
    assert torch.equal(grad.to(torch.bfloat16), expected)


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_every_query_chooses_one_block(slots, device):
    selection = torch.full((5 * LEN, 1, slots), -1, dtype=torch.int32)
    selection[..., 0] = 1
    case = make_case(segment(3, 5), selection, num_kv_heads=1, local_blocks=[3, 4, 5, 6, 7], device=device)
    check(case)


def test_every_query_chooses_everything(device):
    selection = torch.arange(7, dtype=torch.int32).expand(3 * LEN, 1, 7).contiguous()  # later blocks are masked
    check(make_case(segment(4, 3), selection, num_kv_heads=1, device=device))


def test_forced_blocks_left_out(device):
    """No first, own or previous block: only irregular ones, and rows of one block."""
    selection = torch.tensor([1, 3, 4, -1], dtype=torch.int32).repeat(2 * LEN, 2, 1)
    selection[5:9] = torch.tensor([2, -1, -1, -1], dtype=torch.int32)
    check(make_case(segment(6, 2), selection, device=device))


def test_rows_that_see_nothing(device):
    """Padding rows, rows of -1 only, and rows whose only block is later than their own."""
    position = segment(2, 2, tokens=LEN + 5)
    selection = random_selection(position, 2, 4)
    selection[3] = -1
    selection[4] = torch.tensor([3, -1, -1, -1], dtype=torch.int32)
    case = make_case(position, selection, device=device)
    check(case)
    out, lse = attend_with(selected_attention, case, case.leaves())
    for rows in (slice(3, 5), slice(LEN + 5, None)):
        assert (out[rows] == 0).all()
        assert (lse[rows] == -math.inf).all()


def test_documents_of_a_pack(device):
    """Two documents: the second one's first block is not block 0, and the tile of a block's end spans both."""
    position = torch.cat([segment(0, 2, tokens=LEN + 3), segment(2, 3)])
    own = position // LEN
    first = torch.where(position >= 2 * LEN, 2, 0)
    rows = [
        sorted({int(f), max(int(f), int(o) - 1), int(o)}) if o >= 0 else [] for f, o in zip(first, own, strict=True)
    ]
    selection = torch.tensor([row + [-1] * (4 - len(row)) for row in rows], dtype=torch.int32)[:, None]
    check(make_case(position, selection.expand(-1, 2, -1), device=device))


def test_large_logits_and_a_sink(device):
    case = make_case(torch.arange(4 * LEN), None, std=10.0, device=device)
    with torch.no_grad():
        case.k[int(case.block_table[0, 0]) * LEN] *= 8
    check(case)


def test_chunks_of_queries_and_heads(device):
    """A small workspace cuts queries (sums of dk, dv go on in fp32) and leaves the forward's bits as they were."""
    case = make_case(torch.arange(5 * LEN), None, num_kv_heads=1, device=device)
    check(case, workspace_bytes=64 * 5 * 2 * 24)
    whole = attend_with(selected_attention, case, case.leaves())
    cut = attend_with(selected_attention, case, case.leaves(), workspace_bytes=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def attend_with(attend, case, leaves, **options):
    remote = {}
    if case.packed is not None:
        dk = case.dims[0]
        remote = {"k_remote": leaves[3][..., :dk], "v_remote": leaves[3][..., dk:]}
    return attend(
        *leaves[:3], case.block_indices, case.block_table, case.position,
        slc_block_len=LEN, softmax_scale=case.dims[0] ** -0.5, **remote, **options,
    )  # fmt: skip


def test_two_runs_give_the_same_bits(device):
    case = make_case(segment(5, 2), None, local_blocks=[5, 6], device=device)
    grads = upstream(case)
    first, second = (run(selected_attention, case, *grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_querys_bits_depend_on_its_own_list_only(device):
    """The same queries with other neighbours, other page numbers, and their pages local instead of remote."""
    position = segment(4, 2)
    selection = random_selection(position, 1, 5)
    whole = make_case(position, selection, group=2, num_kv_heads=1, device=device)
    out, lse = attend_with(selected_attention, whole, whole.leaves())
    table, pages_k, pages_v = whole.block_table[0], *(x[:, 0].unflatten(0, (-1, LEN)) for x in (whole.k, whole.v))
    rows = slice(13, 29)
    chosen = [b for b in selection[rows].unique().tolist() if b >= 0]
    remote = torch.cat([torch.cat([pages_k[table[b]], pages_v[table[b]]], -1)[None] for b in reversed(chosen)])
    table = torch.full_like(whole.block_table, -1)
    for page, block in enumerate(reversed(chosen)):
        table[0, block] = 1 + page
    part = Case(
        whole.q[rows], whole.k[:LEN] * torch.nan, whole.v[:LEN] * torch.nan,
        whole.block_indices[rows], table, whole.position[rows], remote,
    )  # fmt: skip
    part_out, part_lse = attend_with(selected_attention, part, part.leaves())
    assert torch.equal(part_out, out[rows])
    assert torch.equal(part_lse, lse[rows])


def test_upstream_gradients_without_unit_stride(device):
    case = make_case(torch.arange(2 * LEN), None, device=device)
    for grad_out in (
        torch.ones((), dtype=case.q.dtype, device=device).expand(case.q.shape),
        torch.randn(*case.q.shape[:2], 2 * case.dims[1], device=device).to(case.q.dtype)[..., ::2],
        torch.randn(case.q.shape[1], len(case.q), case.dims[1], device=device).to(case.q.dtype).transpose(0, 1),
    ):
        results = []
        for grad in (grad_out, grad_out.contiguous()):
            leaves = case.leaves()
            results.append(torch.autograd.grad(attend_with(selected_attention, case, leaves)[0], leaves, grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_inputs(device):
    """q, k, v as views of one projection, and a table and indices that are not contiguous."""
    case = make_case(torch.arange(2 * LEN), None, num_kv_heads=1, device=device)
    qkv = torch.cat([case.q, case.k, case.v], 1)
    views = replace(
        case,
        q=qkv[:, :2],
        k=qkv[:, 2:3],
        v=qkv[:, 3:],
        block_indices=case.block_indices.transpose(0, 2).contiguous().transpose(0, 2),
        block_table=torch.stack([case.block_table, case.block_table], 1)[:, 0],
    )
    a = attend_with(selected_attention, case, (case.q, case.k, case.v))
    b = attend_with(selected_attention, views, (views.q, views.k, views.v))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradients_of_a_part_of_a_merged_result(device):
    """Two rounds of pages, merged: what each round's backward gives adds up to the gradient of the whole."""
    case = make_case(segment(3, 2), None, num_kv_heads=1, device=device)
    grad_out, _ = upstream(case)
    leaves = case.leaves()
    options = {"slc_block_len": LEN, "softmax_scale": case.dims[0] ** -0.5}
    out, lse = selected_attention(*leaves, case.block_indices, case.block_table, case.position, **options)
    whole = torch.autograd.grad(out, leaves, grad_out)
    delta = (grad_out.float() * out.detach().float()).sum(-1)
    odd = (case.block_indices % 2 == 1) & (case.block_indices >= 0)
    sums = [0.0, 0.0, 0.0]
    for here in (odd, ~odd):
        ids = case.block_indices.masked_fill(~here, 2**20)
        ids = torch.where((ids < 0) | (ids == 2**20), 2**20, ids).sort(-1).values
        ids = ids.masked_fill(ids == 2**20, -1)
        args = (*(x.detach() for x in leaves), ids, case.block_table, case.position)
        options["dtype"] = torch.float32
        grads = selected_attention_backward(grad_out, None, delta, lse.detach(), *args, **options)
        ones = torch.ones_like(lse)
        exact = reference.selected_attention_backward(grad_out, ones, delta, lse.detach(), *args, **options)
        for i, (grad, want) in enumerate(zip(grads[:3], exact[:3], strict=True)):
            assert grad.dtype == torch.float32
            torch.testing.assert_close(grad, want, rtol=2e-2, atol=2e-2)
            sums[i] = sums[i] + grad
        assert grads[3:] == (None, None)
    for total, want in zip(sums, whole, strict=True):
        torch.testing.assert_close(total, want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_a_gate(dtype, device):
    """The gate of a strided column, of any sign and zero: as autograd through gate * out, remote pages included."""
    case = make_case(segment(4, 2), None, group=2, local_blocks=[4, 5], dtype=dtype, device=device)
    grad_out, no_grad_lse = upstream(case)[0], torch.zeros(case.q.shape[:2], device=device)
    gates = torch.randn(*case.q.shape[:2], 3, device=device).to(dtype)
    gates[::5] = 0
    gate, (dk, _) = gates[..., 1], case.dims

    def gated(attend):
        def through(*args, **options):
            out, lse = attend(*args, **options)
            return gate.to(out.dtype)[..., None] * out, lse

        return through

    exact = run(gated(reference.selected_attention), case, grad_out, no_grad_lse, torch.float64)[2:]
    plain = run(gated(dense_plain), case, grad_out, no_grad_lse)[2:]
    with torch.no_grad():
        out, lse = attend_with(selected_attention, case, case.leaves())
        delta = (grad_out.float() * out.float()).sum(-1)
        *actual, dk_remote, dv_remote = selected_attention_backward(
            grad_out, gate, delta, lse, case.q, case.k, case.v, case.block_indices, case.block_table, case.position,
            slc_block_len=LEN, softmax_scale=dk**-0.5, dtype=torch.float32,
            k_remote=case.packed[..., :dk], v_remote=case.packed[..., dk:],
        )  # fmt: skip
    actual.append(torch.cat([dk_remote, dv_remote], -1))
    for name, a, p, e in zip(("dq", "dk", "dv", "dremote"), actual, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert_twice(name, a, p, e)


def test_no_queries(device):
    case = make_case(torch.arange(LEN), None, device=device)
    case = replace(
        case, q=case.q[:0], block_indices=case.block_indices[:0], position=case.position[:0]
    )  # fmt: skip
    leaves = case.leaves()
    out, lse = attend_with(selected_attention, case, leaves)
    assert out.shape == (0, *case.q.shape[1:])
    grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"q": lambda c: c.q.double()}, "nsa_kernels.reference"),
        ({"q": lambda c: c.q[..., :12], "k": lambda c: c.k[..., :12]}, "pad the head dim"),
        ({"v": lambda c: c.v[..., ::2].repeat(1, 1, 2)[..., ::2]}, r"v\.contiguous\(\)|pad the head dim"),
        ({"k": lambda c: c.k[:-1], "v": lambda c: c.v[:-1]}, "pad each document to whole blocks"),
        ({"position": lambda c: c.position[:-1]}, "for this rank's tokens"),
    ],
)
def test_errors_name_the_remedy(change, remedy, device):
    case = make_case(torch.arange(2 * LEN), None, device=device)
    case = replace(case, **{name: value(case) for name, value in change.items()})
    with pytest.raises(ValueError, match=remedy):
        attend_with(selected_attention, case, (case.q, case.k, case.v))


def test_one_kind_of_remote_tensor_is_an_error(device):
    case = make_case(torch.arange(2 * LEN), None, device=device)
    with pytest.raises(ValueError, match="pass both or neither"):
        selected_attention(
            case.q, case.k, case.v, case.block_indices, case.block_table, case.position,
            slc_block_len=LEN, softmax_scale=1.0, k_remote=case.k[:LEN].transpose(0, 1),
        )  # fmt: skip
