"""The cache against training's forward, and what it refuses. Plain PyTorch in fp64, unless a test says otherwise."""

import math

import pytest
import torch

import nsa_kernels
from cases import PAPER, SMALL
from inference_cases import CONFIGS, KINDS, Case, Play
from nsa_dist import BranchKV, NSAConfig, ShardPlan, nsa_attention
from nsa_dist.inference import CacheFullError, NSACache, nsa_decode, nsa_prefill
from nsa_kernels import cpu, reference


def snapshot(cache: NSACache) -> list:
    """Free pages, lengths, and all that sequences hold."""
    storage, states = cache.storage, cache._sequences
    held = torch.cat([state.pages for state in states.values()])
    tensors = [x[held] for pair in (storage.slc, storage.cmp) for x in pair]
    tensors += [x.clone() for pair in (storage.win, storage.raw) for x in pair]
    return [cache.num_free_pages, {seq: state.length for seq, state in states.items()}, *tensors]


def same(a: list, b: list) -> bool:
    return a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2:], b[2:], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_kv", [False, True])
def test_token_by_token_is_training(kind, shared_kv):
    case = Case.of(70, SMALL, kind, shared_kv, seed=3)
    cache = case.cache(5)
    seq = cache.new_sequence()
    steps = [nsa_decode(*case.batch([[t]]), cache, torch.tensor([seq]), return_block_indices=True) for t in range(70)]
    out, blocks = (torch.cat([step[i][0] for step in steps]) for i in (0, 1))
    expected, expected_blocks = case.trained(range(70))
    assert torch.equal(blocks, expected_blocks)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ops", [reference, cpu])
def test_whole_sequences_have_the_bits_of_training(ops):
    """Several at once as well: then training's forward is of the same pack."""
    case = Case.of(150, SMALL, "mlp", False, seed=4)
    case.inputs.phi_k.float(), case.inputs.phi_v.float()
    cache = case.cache(14, torch.float32)
    q, kv, gates = case.rows(range(150))
    q, kv, gates = q.float(), BranchKV(*(x.float() for x in kv)), gates.float()
    bounds = [0, 37, 37, 41, 150]
    with torch.no_grad():
        expected = nsa_attention(
            q, kv, gates, SMALL, compress_k=case.phis[0], compress_v=case.phis[1],
            cu_seqlens=torch.tensor([0, 37, 41, 150]), ops=ops,
        )  # fmt: skip
    seqs = [cache.new_sequence() for _ in range(4)]
    assert torch.equal(nsa_prefill(q, kv, gates, cache, seqs, cu_seqlens=bounds, ops=ops), expected)
    assert [cache.length(seq) for seq in seqs] == [37, 0, 4, 109]


def test_kernels_give_a_query_the_same_bits_whatever_the_chunks():
    """Triton's, in tiles as training has them: in the interpreter here, natively on a GPU (`tests/kernels`)."""
    cfg = NSAConfig(num_slc_blocks=3, window_len=40)
    case = Case.of(200, cfg, "mlp", False, seed=5, heads=(2, 1, 16, 16))
    for phi in case.phis:
        phi.float()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for phi in case.phis:
        phi.to(device)
    case.inputs.q, case.inputs.gates, case.inputs.kv, case.inputs.weight = (
        case.inputs.q.float().to(device),
        case.inputs.gates.float().to(device),
        BranchKV(*(x.float().to(device) for x in case.inputs.kv)),
        torch.empty(0),
    )
    q, kv, gates = (case.inputs.q.detach(), BranchKV(*(x.detach() for x in case.inputs.kv)), case.inputs.gates.detach())
    with torch.no_grad():
        expected, blocks = nsa_attention(
            q, kv, gates, cfg, compress_k=case.phis[0], compress_v=case.phis[1], ops=nsa_kernels,
            return_block_indices=True,
        )  # fmt: skip
    cache = NSACache(cfg, 1, 16, 16, 6, device=device, compress_k=case.phis[0], compress_v=case.phis[1])
    seq = cache.new_sequence()
    for start, stop in ((0, 40), (40, 129), (129, 200)):
        part = q[start:stop], BranchKV(*(x[start:stop] for x in kv)), gates[start:stop]
        out, chosen = nsa_prefill(*part, cache, [seq], ops=nsa_kernels, return_block_indices=True)
        assert torch.equal(chosen, blocks[start:stop])
        assert torch.equal(out, expected[start:stop])


@pytest.mark.parametrize("seed", range(30))
def test_drawn_cases(seed):
    Play(seed, most=120 if seed % 5 else 400, steps=12).run()


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_drawn_cases(hundred):
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        Play(seed, most=5000 if seed % 10 == 0 else 600, steps=16).run()


@pytest.mark.parametrize("what", ["prefill", "decode", "fork"])
def test_a_full_pool_leaves_everything_as_it_was(what):
    case = Case.of(64, SMALL, "mlp", False, seed=6)
    cache = case.cache(4)
    a, b = cache.new_sequence(), cache.new_sequence()
    nsa_prefill(*case.rows(range(15 + 32)), cache, [a, b], cu_seqlens=[0, 15, 47])
    assert cache.num_free_pages == 1
    if what == "fork":
        cache.fork(a)
    before = snapshot(cache)
    match = r"needs \d+ pages, but \d of the cache's 4 are free.*num_pages=\d+ or more.*Nothing was written"
    with pytest.raises(CacheFullError, match=match):
        {
            "prefill": lambda: nsa_prefill(*case.rows(range(33)), cache, [a, b], cu_seqlens=[0, 1, 33]),
            "decode": lambda: nsa_decode(*case.batch([[0, 1], [2, 3]]), cache, [a, b]),
            "fork": lambda: cache.fork(a),
        }[what]()
    assert same(snapshot(cache), before)
    cache.free(b)
    nsa_decode(*case.batch([[0]]), cache, [a])


def test_what_fails_on_the_way_leaves_everything_as_it_was():
    case = Case.of(64, SMALL, "callable", False, seed=7)

    def failing(x, block_start):
        raise RuntimeError("phi of the caller's")

    cache = case.cache(8)
    a = cache.new_sequence()
    nsa_prefill(*case.rows(range(21)), cache, [a])
    b = cache.fork(a)
    cache.truncate(b, 15)
    before = snapshot(cache)
    cache.compress_k = failing
    with pytest.raises(RuntimeError, match="phi of the caller's"):
        nsa_prefill(*case.rows(range(25)), cache, [a])
    assert same(snapshot(cache), before)


def test_nan_of_a_sequence_reaches_no_other():
    case = Case.of(40, SMALL, "mlp", False, seed=8)
    expected = case.trained(range(40))[0]
    cache = case.cache(6)
    nan = [torch.full_like(x, math.nan) for x in case.inputs.leaves()]
    seq = cache.new_sequence()
    nsa_prefill(nan[0].detach(), BranchKV(*(x.detach() for x in nan[1:7])), nan[7].detach(), cache, [seq])
    cache.free(seq)
    a = cache.new_sequence()
    nsa_prefill(*case.rows(range(33)), cache, [a])
    rejected = [x[None, :3].detach() for x in nan]
    nsa_decode(rejected[0], BranchKV(*rejected[1:7]), rejected[7], cache, [a])
    cache.truncate(a, 33)
    out = nsa_decode(*case.batch([list(range(33, 40))]), cache, [a])
    torch.testing.assert_close(out[0], expected[33:], rtol=0, atol=1e-10)


def test_a_fork_shares_full_pages():
    case = Case.of(64, SMALL, "mean", False, seed=9)
    cache = case.cache(8)
    a = cache.new_sequence()
    nsa_prefill(*case.rows(range(50)), cache, [a])
    b = cache.fork(a)
    assert cache.num_free_pages == 8 - 4 - 1
    cache.free(a)
    assert cache.num_free_pages == 8 - 4
    assert cache.length(b) == 50


@pytest.mark.parametrize("cfg", [NSAConfig(), *CONFIGS])
def test_bytes(cfg):
    cache = NSACache(cfg, 2, 12, 8, 64, dtype=torch.bfloat16, max_sequences=3)
    shape, dense = cache.shape, 64 * cfg.slc_block_len * 2 * (12 + 8) * 2
    assert cache.num_bytes() == shape.num_bytes(64, 3, torch.bfloat16)
    assert shape.num_bytes(64, 0, torch.bfloat16) == dense + dense // cfg.cmp_stride


def test_a_long_context_takes_a_seventeenth_more_than_a_dense_cache():
    cache = NSACache(PAPER, 1, 8, 8, 1024, max_sequences=1)
    assert cache.num_bytes() / (1024 * 64 * 16 * 4) == pytest.approx(1 + 1 / 16, abs=0.01)


def test_refusals():
    case = Case.of(40, SMALL, "mlp", False, seed=10)
    cache = case.cache(6)
    seq = cache.new_sequence()
    nsa_prefill(*case.rows(range(30)), cache, [seq])
    before = snapshot(cache)
    one, batch = case.rows([0]), case.batch([[0]])
    single = BranchKV(*(x.float() for x in one[1]))
    freed = cache.new_sequence()
    cache.free(freed)
    refused = [
        (lambda: cache.length(99), "sequence 99 is unknown.*pass an id that new_sequence or fork returned"),
        (lambda: cache.fork(freed), f"sequence {freed} was freed.*pass an id"),
        (lambda: nsa_decode(*batch, cache, [freed]), "was freed"),
        (lambda: nsa_prefill(*case.rows([]), cache, [freed]), "was freed"),
        (lambda: cache.truncate(seq, 21), "22 to 30 of them, not to 21.*fork it before"),
        (lambda: cache.truncate(seq, 31), "22 to 30 of them, not to 31"),
        (lambda: nsa_decode(*case.batch([[0], [1]]), cache, [seq, seq]), "twice.*pass each id once"),
        (lambda: nsa_decode(*case.batch([[0] * 9]), cache, [seq]), "9 new tokens.*append longer chunks"),
        (lambda: nsa_decode(*one, cache, [seq]), r"must be \[B, new, heads, ...\].*unsqueeze\(1\)"),
        (lambda: nsa_decode(*batch, cache, [seq, 0]), "there are 2 sequences"),
        (lambda: nsa_prefill(*one, cache, [seq], cu_seqlens=[0, 2]), "must rise from 0 to the 1 tokens"),
        (lambda: nsa_decode(*batch, cache, [seq], plan=ShardPlan.zigzag([0, 9], 2, 16)), "cp_group has 1 ranks"),
        (lambda: nsa_prefill(one[0].float(), single, one[2], cache, [seq]), "NSACache with dtype=torch"),
        (lambda: nsa_prefill(one[0][..., :4], one[1], one[2], cache, [seq]), "k_cmp has shape"),
        (lambda: NSACache(SMALL, 2, 8, 8, 0), "num_pages=0 must be at least 1"),
        (lambda: NSACache(SMALL, 2, 8, 8, 1, dtype=torch.int32), "pass the dtype of q"),
    ]  # fmt: skip
    for call, match in refused:
        with pytest.raises(ValueError, match=match):
            call()
    assert same(snapshot(cache)[:2], before[:2])
    other = NSACache(SMALL, 2, 8, 12, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="make an NSACache of these sizes"):
        nsa_decode(*batch, other, [other.new_sequence()])


def test_taken_back_counts_from_the_longest():
    case = Case.of(40, SMALL, "mean", False, seed=11)
    cache = case.cache(6)
    seq = cache.new_sequence()
    nsa_prefill(*case.rows(range(30)), cache, [seq])
    cache.truncate(seq, 25)
    nsa_decode(*case.batch([[0]]), cache, [seq])
    with pytest.raises(ValueError, match="has 26 tokens and had 30, so it can be truncated to 22 to 26"):
        cache.truncate(seq, 21)


def drawn_steps(cache, case, seq):
    """40 tokens at once, then to 100 by ones and threes, once with a draft taken back: outputs and blocks."""
    found = [nsa_prefill(*case.rows(range(40)), cache, [seq], return_block_indices=True)]
    draft = cache.fork(seq)
    nsa_decode(*case.batch([range(7)]), cache, [draft])
    cache.free(draft)
    while cache.length(seq) < 100:
        start = cache.length(seq)
        nsa_decode(*case.batch([range(8)]), cache, [seq])
        cache.truncate(seq, start)
        new = range(start, min(100, start + 1 + start % 3))
        found.append([x[0] for x in nsa_decode(*case.batch([new]), cache, [seq], return_block_indices=True)])
    return [torch.cat(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", ["mlp", "mean turned"])
def test_pages_in_fp8(kind):
    """The error is that of 4 bits, not none and not more; blocks differ where importances nearly tie. Scales do not
    matter while numbers fit; forks, truncations and partial pages hold the same."""
    case = Case.of(100, SMALL, kind, False, seed=5)
    whole = case.cache(20)
    out, blocks = drawn_steps(whole, case, whole.new_sequence())
    found = []
    for scale in (1.0, 0.25):
        cache = case.cache(20, page_dtype=torch.float8_e4m3fn, k_scale=scale, v_scale=2 * scale)
        found.append(drawn_steps(cache, case, cache.new_sequence()))
        assert cache.num_bytes() == cache.shape.num_bytes(20, 2, torch.float64, torch.float8_e4m3fn)
    (fp8_out, fp8_blocks), (scaled, scaled_blocks) = found
    same = (fp8_blocks == blocks).all(-1).all(-1)
    error = (fp8_out - out)[same].norm() / out[same].norm()
    assert 5e-3 < error < 5e-2
    assert same.double().mean() > 0.8
    assert (scaled - fp8_out).norm() / out.norm() < 1e-2  # below 2 ** -6 spacing is even, so small numbers differ
    assert (scaled_blocks == fp8_blocks).all(-1).all(-1).double().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"page_dtype": torch.float8_e5m2}, "pass torch.float8_e4m3fn"),
        ({"page_dtype": torch.float8_e4m3fn, "k_scale": 0.3}, "power of two above"),
        ({"page_dtype": torch.float8_e4m3fn, "v_scale": 0.0}, "power of two above"),
        ({"v_scale": 2.0}, "pass page_dtype="),
    ],
)
def test_page_formats_that_are_refused(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        NSACache(SMALL, 2, 8, 8, 4, **options)
