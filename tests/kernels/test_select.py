"""Block selection against the fp32 reference: the same sets, or ties within fp32 rounding, which are counted."""

import pytest
import torch

from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.packs import pack
from kernels.ties import assert_same_but_for_ties, importance
from nsa_kernels import reference
from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.selection import hopper_importance, select
from nsa_kernels.selection import importance as select_importance
from nsa_kernels.selection.select import select_blocks

SIZES = {
    "cmp_block_len": 32,
    "cmp_stride": 16,
    "slc_block_len": 64,
    "num_slc_blocks": 6,
    "num_init_blocks": 1,
    "num_local_blocks": 2,
}


def problem(doc_lens, group, num_kv_heads, head_dim, dtype, device, std=1.0, **sizes):
    """Arguments of select_blocks, lse from the reference."""
    sizes = SIZES | sizes
    p = pack(doc_lens, sizes["cmp_block_len"], sizes["cmp_stride"], sizes["slc_block_len"]).to(device)
    q = (torch.randn(len(p.begin), group * num_kv_heads, head_dim, device=device) * std).to(dtype)
    k = torch.randn(p.num_blocks, num_kv_heads, head_dim, device=device).to(dtype)
    return with_lse(q, k, p, sizes)


def with_lse(q, k, p, sizes):
    scale = q.shape[-1] ** -0.5
    _, lse = reference.compressed_attention(q.float(), k.float(), k.float(), p.begin, p.end, softmax_scale=scale)
    return (q, k, lse, p.begin, p.end, p.position, p.doc_start), sizes | {"softmax_scale": scale}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim"), [(1, 2, 16), (4, 1, 48), pytest.param(3, 2, 16, marks=SLOW_WITHOUT_A_GPU)]
)
def test_chooses_as_the_reference(group, num_kv_heads, head_dim, dtype, device):
    arguments, sizes = problem([700], group, num_kv_heads, head_dim, dtype, device)
    assert assert_same_but_for_ties(arguments, sizes) <= 2


def test_packed_documents_share_tiles(device):
    """Tiles whose queries belong to several documents, some of them shorter than one compressed block."""
    arguments, sizes = problem([130, 20, 600, 64, 31, 70], 2, 1, 16, torch.bfloat16, device)
    assert assert_same_but_for_ties(arguments, sizes) <= 2


@pytest.mark.parametrize(
    "lengths",
    [(32, 8, 16, 5), (96, 16, 48, 3), (16, 16, 64, 3), (64, 8, 16, 4), (32, 16, 64, 1)],
    ids=["half blocks", "48 = 3 strides", "no overlap", "a key in 5 blocks", "one block"],
)
def test_other_block_lengths(lengths, device):
    block_len, stride, slc_block_len, n = lengths
    sizes = {"cmp_block_len": block_len, "cmp_stride": stride, "slc_block_len": slc_block_len, "num_slc_blocks": n}
    forced = {"num_init_blocks": int(n > 1), "num_local_blocks": min(2, max(1, n - 1))}
    arguments, sizes = problem([260, 90], 2, 1, 16, torch.float32, device, **sizes, **forced)
    assert assert_same_but_for_ties(arguments, sizes) <= 2


def test_large_logits(device):
    arguments, sizes = problem([600], 2, 1, 32, torch.bfloat16, device, std=10.0)
    assert assert_same_but_for_ties(arguments, sizes) <= 6


def test_chunks_give_the_bits_of_one_pass(device, monkeypatch):
    arguments, sizes = problem([500], 2, 2, 16, torch.bfloat16, device)
    whole = select_blocks(*arguments, **sizes)
    monkeypatch.setattr(select, "MAX_BUFFER_BYTES", 64 * 1024)
    assert torch.equal(whole, select_blocks(*arguments, **sizes))


def test_queries_alone_choose_the_same(device):
    """A rank that holds some of the queries chooses as the one that holds all."""
    (q, k, *rest), sizes = problem([700], 4, 1, 16, torch.bfloat16, device)
    whole = select_blocks(q, k, *rest, **sizes)
    rows = slice(331, 350)
    assert torch.equal(whole[rows], select_blocks(q[rows], k, *(t[rows] for t in rest), **sizes))


def test_ties_go_to_the_lower_index(device):
    """Equal keys make every inner block equally important."""
    p = pack([900]).to(device)
    q, k = torch.randn(960, 2, 16, device=device), torch.ones(p.num_blocks, 1, 16, device=device)
    arguments, sizes = with_lse(q, k, p, SIZES)
    chosen = select_blocks(*arguments, **sizes)[895, 0].tolist()  # own block 13, which ends with the query
    # Block 0 is forced. Blocks 1 .. 11 all hold 8 halves of equal keys.
    assert chosen == [0, 1, 2, 3, 12, 13]


def test_forced_blocks_and_padding(device):
    arguments, sizes = problem([100, 200], 1, 1, 16, torch.float32, device)
    chosen = select_blocks(*arguments, **sizes)[:, 0]
    assert chosen[5].tolist() == [0, -1, -1, -1, -1, -1]
    assert chosen[99].tolist() == [0, 1, -1, -1, -1, -1]
    assert (chosen[100:128] == -1).all()  # the padding of the first document
    assert chosen[128].tolist() == [2, -1, -1, -1, -1, -1]
    assert chosen[327].tolist() == [2, 3, 4, 5, -1, -1]


def one_hot_problem(hot_rows, doc_len, device, **sizes):
    """One head per entry of `hot_rows`; head g gives nearly all its weight to compressed row hot_rows[g]."""
    p = pack([doc_len]).to(device)
    q, k = torch.zeros(len(p.begin), len(hot_rows), 16, device=device), torch.zeros(p.num_blocks, 1, 16, device=device)
    for g, row in enumerate(hot_rows):
        q[:, g, g] = 8.0
        k[row, 0, g] = 8.0
    return with_lse(q, k, p, SIZES | sizes)


def test_weights_are_not_shifted_by_a_stride(device):
    """Compressed row 19 covers tokens 304 .. 335: one cell of block 4, one of block 5, and none of block 3."""
    arguments, sizes = one_hot_problem([19], 1000, device, num_slc_blocks=5)
    chosen = select_blocks(*arguments, **sizes)[999, 0].tolist()
    assert chosen == [0, 4, 5, 14, 15]


def test_importance_is_summed_over_the_group(device):
    """Head 0 wants row 20 (in block 5), heads 1 to 3 want row 40 (in block 10): with one choice, the group takes 10."""
    arguments, sizes = one_hot_problem([20, 40, 40, 40], 1000, device, num_slc_blocks=4)
    assert select_blocks(*arguments, **sizes)[999, 0].tolist() == [0, 10, 14, 15]


def test_layers_worked_example(device):
    """The example of the docstring: p = 1 on 8 compressed blocks gives blocks 0 and 1 the importance 7 and 8."""
    p = pack([144]).to(device)
    q, k = torch.zeros(192, 1, 16, device=device), torch.zeros(8, 1, 16, device=device)
    (*head, _, begin, end, position, doc_start), sizes = with_lse(q, k, p, SIZES)
    lse = torch.zeros(192, 1, device=device)
    imp = importance((*head, lse, begin, end, position, doc_start), sizes)
    assert imp[143, 0, :2].tolist() == [7, 8]
    sizes |= {"num_slc_blocks": 1, "num_init_blocks": 0, "num_local_blocks": 0}
    assert select_blocks(*head, lse, begin, end, position, doc_start, **sizes)[143, 0].tolist() == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slc_block_len", [64, 128])
@pytest.mark.parametrize(("group", "head_dim"), [(8, 128), (16, 128), (32, 128), (64, 128), (16, 64)])
def test_importances_of_both_kernels_have_the_same_bits(group, head_dim, slc_block_len, device):
    (q, k, lse, begin, end, *_), sizes = problem(
        [3000, 31, 700, 4400], group, 2, head_dim, torch.bfloat16, device, slc_block_len=slc_block_len
    )
    if not hopper_takes(q, k):
        pytest.skip("needs a Hopper GPU")
    cells = {"cells_cmp": 2, "cells_slc": slc_block_len // 16}
    buffers = []
    for fill, keys in (
        (select_importance.importance, k),
        (hopper_importance.importance, hopper_importance.boxes_of_blocks(k, cells["cells_slc"])),
    ):
        buffers.append(torch.zeros(2, len(q), 2, -(-len(k) // cells["cells_slc"]), device=device))
        fill(q, keys, lse, begin, end, buffers[-1], 0, len(q), softmax_scale=sizes["softmax_scale"], **cells)
    assert buffers[0].max() > 0
    assert torch.equal(*buffers)


@pytest.mark.parametrize(("num_queries", "doc_len"), [(0, 64), (64, 20)])
def test_no_queries_or_no_keys(num_queries, doc_len, device):
    (q, k, *rest), sizes = problem([doc_len], 1, 1, 16, torch.float32, device)
    rows = slice(0, num_queries)
    chosen = select_blocks(q[rows], k, *(t[rows] for t in rest), **sizes)
    assert chosen.shape == (num_queries, 1, 6)
    assert (chosen[:doc_len, :, 0] == 0).all()
    assert (chosen[:, :, 1:] == -1).all()


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda a: a.update(cmp_block_len=40), "cmp_block_len=48"),
        (lambda a: a.update(lse_cmp=a["lse_cmp"][:, :1]), "pass that one"),
        (lambda a: a.update(doc_start=a["doc_start"][:3]), "one entry per token"),
        (lambda a: a.update(q=a["q"][..., :15]), "one head dim"),
        (lambda a: a.update(q=a["q"].double()), "nsa_kernels.reference"),
    ],
)
def test_errors_name_the_remedy(change, remedy, device):
    positional, sizes = problem([64], 2, 1, 16, torch.float32, device)
    names = ("q", "k_cmp", "lse_cmp", "cmp_begin", "cmp_end", "position", "doc_start")
    arguments = dict(zip(names, positional, strict=True)) | sizes
    change(arguments)
    with pytest.raises(ValueError, match=remedy):
        select_blocks(**arguments)


@pytest.mark.parametrize("group", [8, 16])
def test_the_kernel_of_large_problems_gives_the_same_bits(group, device, monkeypatch):
    """On a Hopper GPU the Gluon kernel; elsewhere both are the same. Documents begin inside its boxes of blocks."""
    arguments, sizes = problem([220, 20, 130], group, 1, 64, torch.bfloat16, device, cmp_stride=8, slc_block_len=32)
    few = select_blocks(*arguments, **sizes)
    monkeypatch.setattr(select, "MIN_PAIRS_ON_HOPPER", 0)
    assert torch.equal(select_blocks(*arguments, **sizes), few)
    assert_same_but_for_ties(arguments, sizes)
