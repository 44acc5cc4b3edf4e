"""The cache over ranks against training's forward in fp64: ranks are processes over gloo, or threads."""

import math
from itertools import product

import pytest
import torch

import nsa_kernels
from cases import SMALL
from inference.test_decode import KernelPlay
from inference_cases import CONFIGS, Case
from nsa_dist import BranchKV, NSAConfig, ShardPlan
from nsa_dist.cp.comm import Comm
from nsa_dist.inference import CacheFullError, NSACache, nsa_decode, nsa_prefill
from nsa_dist.inference.model import GPT, GPTConfig
from nsa_dist.inference.over_ranks.storage import following_cells, placement_over
from nsa_dist.inference.over_ranks.traffic import decode_bytes
from rank_cache_cases import PLACEMENTS, RankPlay, over_processes, prefilled
from ranks import run_ranks
from thread_ranks import ThreadComm, run_threads

BOTH = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_teacher_forcing_over_processes_is_training(world_size):
    """Over every number of ranks up to that; threads stand for three and four below."""
    answers = run_ranks(world_size, over_processes, world_size)
    out, blocks = Case.of(70, SMALL, "mlp", False, seed=3).trained(range(70))
    for size, placement in product(range(1, world_size + 1), PLACEMENTS):
        for rank in range(size):
            mine, first = (answers[r][size, placement] for r in (rank, 0))
            found = [torch.cat(x) for x in zip(*mine, strict=True)]
            torch.testing.assert_close(found[0], out, rtol=0, atol=1e-10)
            assert torch.equal(found[1], blocks)
            assert all(torch.equal(a[0], b[0]) for a, b in zip(mine, first, strict=True))


def play_over_ranks(seed: int, placement: str, **sizes: int) -> None:
    run_threads(seed % 4 + 1, lambda comm: RankPlay(comm, seed, **sizes, placement=placement).run())


@BOTH
@pytest.mark.parametrize("seed", range(8))
def test_drawn_cases(seed, placement):
    play_over_ranks(seed, placement, most=120, steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(4))
def test_four_hundred_drawn_cases(hundred):
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        play_over_ranks(seed, PLACEMENTS[seed // 4 % 2], most=3000 if seed % 20 == 0 else 400, steps=14)


class RankKernelPlay(RankPlay):
    """Decoding by kernels, in fp32; on a GPU in its memory."""

    case_type, decode_ops, configs, heads = (
        KernelPlay.case_type, KernelPlay.decode_ops, KernelPlay.configs, KernelPlay.heads,
    )  # fmt: skip


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("seed", [0, 1, 5])  # over 2, 3 and 4 ranks
def test_drawn_cases_by_kernels(seed, placement):
    run_threads(seed % 3 + 2, lambda comm: RankKernelPlay(comm, seed, 80, 6, placement).run())


@BOTH
@pytest.mark.parametrize("cfg", [CONFIGS[0], pytest.param(CONFIGS[1], marks=pytest.mark.slow), CONFIGS[2]])
def test_ties_go_to_the_lower_block_wherever_it_lies(cfg, placement):
    """Keys of zero: every score is 0, and every importance but the last one's the same."""
    case = Case.of(64, cfg, "mean", False, seed=4)
    case.inputs.kv = case.inputs.kv._replace(k_cmp=torch.zeros_like(case.inputs.kv.k_cmp).detach())
    expected = case.trained(range(64))[1]

    def forced(comm):
        cache = case.cache(40, cmp_placement=placement)
        seq = cache.new_sequence()
        steps = [list(range(t, t + 4)) for t in range(0, 64, 4)]
        found = [nsa_decode(*case.batch([t]), cache, [seq], cp_group=comm, return_block_indices=True) for t in steps]
        return torch.cat([blocks[0] for _, blocks in found])

    for blocks in run_threads(3, forced):
        assert torch.equal(blocks, expected)


@pytest.mark.parametrize(
    ("ops", "placement"),
    [
        (None, "sharded"),
        (nsa_kernels, "replicated"),
        pytest.param(nsa_kernels, "sharded", marks=pytest.mark.slow),
        pytest.param(None, "replicated", marks=pytest.mark.slow),
    ],
)
def test_single_precision_is_near(ops, placement):
    """The operators for CPUs, and Triton's kernels in the interpreter, against the fp64 of training."""
    case = Case.of(90, NSAConfig(32, 16, 64, 3, 1, 1, 40), "mean", False, seed=5, heads=(2, 1, 16, 16))
    expected, expected_blocks = case.trained(range(90))

    def single(rows):
        return rows[0].float(), BranchKV(*(x.float() for x in rows[1])), rows[2].float()

    def work(comm):
        cache = case.cache(3, torch.float32, cmp_placement=placement)
        seq = cache.new_sequence()
        plan = ShardPlan.zigzag([0, 80], comm.size)
        first = prefilled(single(case.rows(range(80))), cache, [seq], plan, comm, ops=ops)
        batch = single(case.batch([list(range(80, 85))])), single(case.batch([list(range(85, 90))]))
        steps = [nsa_decode(*x, cache, [seq], cp_group=comm, ops=ops, return_block_indices=True) for x in batch]
        return [torch.cat([first[i], *(step[i][0] for step in steps)]) for i in (0, 1)]

    for out, blocks in run_threads(2, work):
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(blocks, expected_blocks)


@BOTH
def test_a_full_rank_refuses_on_all_and_leaves_everything_as_it_was(placement):
    case = Case.of(200, SMALL, "mlp", False, seed=6)

    def work(comm):
        cache = case.cache(2, cmp_placement=placement)  # 4 pages of 16 tokens over 2 ranks
        a, b = cache.new_sequence(), cache.new_sequence()
        nsa_decode(*case.batch([[0], [1]]), cache, [a, b], cp_group=comm)
        nsa_decode(*case.batch([list(range(8))]), cache, [a], cp_group=comm)
        match = r"needs 2 pages of rank 0, but 1 of the cache's 2 are free.*num_pages=3 or more.*Nothing was written"
        with pytest.raises(CacheFullError, match=match):
            prefilled(case.rows(range(60)), cache, [a], ShardPlan.zigzag([0, 60], 2, 16), comm)
        assert (cache.length(a), cache.length(b), cache.num_free_pages) == (9, 1, 1)
        out, _ = prefilled(case.rows(range(8, 23)), cache, [a], ShardPlan.zigzag([0, 15], 2, 16), comm)
        return out

    expected = case.trained([0, *range(8), *range(8, 23)])[0][9:]
    for out in run_threads(2, work):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@BOTH
def test_nan_of_a_sequence_reaches_no_other(placement):
    case = Case.of(60, NSAConfig(16, 4, 8, 6, 2, 2, 33), "mlp", False, seed=8)
    expected = case.trained(range(60))[0]
    q, *kv, gates = (torch.full_like(x, math.nan).detach() for x in case.inputs.leaves())

    def work(comm):
        cache = case.cache(8, cmp_placement=placement)
        seq = cache.new_sequence()
        prefilled((q, BranchKV(*kv), gates), cache, [seq], ShardPlan.zigzag([0, 60], 3, 8), comm)
        cache.free(seq)
        seq = cache.new_sequence()
        first, _ = prefilled(case.rows(range(50)), cache, [seq], ShardPlan.contiguous([0, 50], 3, 8), comm)
        nsa_decode(q[None, :3], BranchKV(*(x[None, :3] for x in kv)), gates[None, :3], cache, [seq], cp_group=comm)
        cache.truncate(seq, 50)
        rest = [nsa_decode(*case.batch([list(range(t, t + 5))]), cache, [seq], cp_group=comm)[0] for t in (50, 55)]
        return torch.cat([first, *rest])

    for out in run_threads(3, work):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@BOTH
def test_what_differs_between_ranks_is_refused_on_all(placement):
    case = Case.of(20, SMALL, "mean", False, seed=9)

    def work(comm):
        cache = case.cache(2, cmp_placement=placement)
        seq = cache.new_sequence()
        with pytest.raises(ValueError, match=r"given different tokens or sequences.*a broadcast of the drawn token"):
            nsa_decode(*case.batch([[comm.rank]]), cache, [seq], cp_group=comm)
        assert cache.length(seq) == 0
        nsa_decode(*case.batch([[0]]), cache, [seq], cp_group=comm)

    run_threads(2, work)


def test_refusals():
    case = Case.of(40, SMALL, "mean", False, seed=10)
    rows, batch = case.rows(range(20)), case.batch([[0]])

    def work(comm):
        cache, whole = case.cache(4), case.cache(4)
        seq, other = cache.new_sequence(), whole.new_sequence()
        nsa_decode(*batch, cache, [seq], cp_group=comm)
        nsa_decode(*batch, whole, [other])
        three = ThreadComm(board=type(comm.board)(3), index=comm.rank)
        plan, short = ShardPlan.zigzag([0, 20], 3, 16), ShardPlan.zigzag([0, 30], 2, 16)
        for call, match in [
            (lambda: nsa_decode(*batch, cache, [seq]), "no cp_group was given.*pass the cp_group"),
            (lambda: nsa_decode(*batch, cache, [seq], cp_group=three), "that of rank . of 2.*pass that group"),
            (lambda: nsa_decode(*batch, whole, [other], cp_group=comm), "lie here whole.*make another NSACache"),
            (lambda: nsa_decode(*batch, cache, [seq], cp_group=comm, plan=plan), "build the plan with cp_size=2"),
            (lambda: nsa_prefill(*rows, cache, [seq], cp_group=comm), "without a plan.*pass the ShardPlan"),
            (lambda: nsa_prefill(*rows, cache, [seq], plan=plan), "cp_group has 1 ranks"),
            (lambda: nsa_prefill(*rows, cache, [seq], plan=short, cp_group=comm), "20 tokens, but"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=match):
                call()
        assert cache.length(seq) == 1

    run_threads(2, work)


@BOTH
def test_a_model_over_ranks_says_what_it_says_alone(placement):
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 32, 4, 2, 8, 48, SMALL, rotary_base=100.0)).requires_grad_(False).double()
    tokens = torch.randint(0, 256, (70,))
    expected = model(tokens)

    def work(comm):
        cache = model.make_cache(80, cmp_placement=placement)
        seq, found = cache.new_sequence(), []
        for start, stop in ((0, 40), (40, 62)):
            plan = ShardPlan.zigzag([0, stop - start], comm.size, 16)
            shard = plan.shard(tokens[start:stop], comm.rank)
            logits = model.prefill(shard, cache, [seq], plan=plan, cp_group=comm)
            found.append(plan.unshard(list(comm.all_gather(logits, "test"))))
        return torch.cat([*found, model.decode(tokens[None, 62:], cache, [seq], cp_group=comm)[0]])

    for logits in run_threads(2, work):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_a_group_of_one_is_none():
    case = Case.of(30, SMALL, "mlp", False, seed=11)
    cache, plan = case.cache(4), ShardPlan.zigzag([0, 20], 1, 16)
    seq = cache.new_sequence()
    out, blocks = prefilled(case.rows(range(20)), cache, [seq], plan, Comm())
    expected, expected_blocks = case.trained(range(20))
    assert torch.equal(out, expected)
    assert torch.equal(blocks, expected_blocks)
    nsa_decode(*case.batch([[20]]), cache, [seq])


@pytest.mark.parametrize("cfg", [NSAConfig(), *CONFIGS])
def test_bytes(cfg):
    """Of a rank what one has alone, and the keys that follow its pages, or the compressed rows of the other's."""
    case = Case.of(20, cfg, "mean", False, seed=12)

    def work(comm):
        sharded, replicated = (case.cache(6, cmp_placement=x) for x in ("sharded", "replicated"))
        alone, rings = sharded.num_bytes(), sharded.shape.num_bytes(0, 1, torch.float64)
        for cache in (sharded, replicated):
            nsa_decode(*case.batch([[0]]), cache, [cache.new_sequence()], cp_group=comm)
        assert sharded.num_bytes() == alone + rings + 6 * sum(following_cells(sharded.shape)) * 2 * 8 * 8
        assert replicated.num_bytes() == alone + rings + 6 * cfg.slc_block_len // cfg.cmp_stride * 2 * (8 + 6) * 8

    run_threads(2, work)


@BOTH
def test_what_a_step_sends(placement):
    case = Case.of(40, SMALL, "mlp", False, seed=13)

    def work(comm):
        cache = case.cache(9, cmp_placement=placement)
        seqs = [cache.new_sequence(), cache.new_sequence()]
        sizes = {"num_q_heads": 4, "num_sequences": 2, "new": 3, "cp_size": 3, "dtype": torch.float64}
        nsa_decode(*case.batch([[0, 1, 2], [3, 4, 5]]), cache, seqs, cp_group=comm)
        expected = decode_bytes(cache.shape, **sizes, placement=placement)
        assert dict(comm.traffic.sent_bytes) == expected
        if placement == "sharded":
            assert expected["lse"] == 2 * (6 * 4 * 8 + 5 * 8)
        else:
            assert expected == {"partials": 2 * (6 * 4 * 7 * 8 + 5 * 8)}

    run_threads(3, work)


@pytest.mark.parametrize(
    ("num_pages", "given", "found"),
    [
        (4, None, "replicated"),
        (4, "sharded", "sharded"),
        (2**14 + 2**10, None, "replicated"),
        (2**14 + 2**10 + 1, None, "sharded"),
        (2**14 + 2**10 + 1, "replicated", "replicated"),
    ],
)
def test_compressed_keys_lie_on_every_rank_up_to_a_million_tokens(num_pages, given, found):
    """Of all ranks and sequences; asked for, they lie as they should."""
    cache = NSACache(NSAConfig(), 1, 2, 2, num_pages // 4 if num_pages % 4 == 0 else num_pages, cmp_placement=given)
    size = 4 if num_pages % 4 == 0 else 1
    assert placement_over(cache, size) == found


def test_other_placements_are_refused():
    with pytest.raises(ValueError, match=r"'nowhere' must be one of 'replicated', 'sharded'.*leave it out"):
        NSACache(SMALL, 1, 8, 8, 4, cmp_placement="nowhere")


def test_ranks_that_placed_them_otherwise_are_refused_on_all():
    case = Case.of(20, SMALL, "mean", False, seed=14)

    class Agreeing(ThreadComm):
        def agree(self, value):
            return len(set(self.board.exchange(self.index, "agree", value))) == 1

    def work(comm):
        cache = case.cache(2, cmp_placement=PLACEMENTS[comm.rank])
        asked = Agreeing(board=comm.board, index=comm.rank)
        with pytest.raises(ValueError, match=r"made different caches.*cmp_placement"):
            nsa_decode(*case.batch([[0]]), cache, [cache.new_sequence()], cp_group=asked)

    run_threads(2, work)


def test_pages_in_fp8_are_one_ranks():
    """First chunk, later chunk, steps, a fork and a truncation: what one rank answers; sharded they are refused."""
    case = Case.of(90, SMALL, "mlp", False, seed=15)
    pages = {"page_dtype": torch.float8_e4m3fn, "k_scale": 0.5, "v_scale": 2.0}

    def steps(cache, prefill, **options):
        seq = cache.new_sequence()
        found = [prefill(cache, seq, 0, 50), prefill(cache, seq, 50, 64)]
        draft = cache.fork(seq)
        nsa_decode(*case.batch([range(7)]), cache, [draft], **options)
        cache.truncate(draft, 65)
        cache.truncate(seq, 60)
        for start in (60, 66):
            batch = case.batch([range(start, start + 6), range(1, 7)])
            step = nsa_decode(*batch, cache, [seq, draft], return_block_indices=True, **options)
            found.append([x.flatten(0, 1) for x in step])
        return [torch.cat(x) for x in zip(*found, strict=True)]

    def alone(cache, seq, start, stop):
        return nsa_prefill(*case.rows(range(start, stop)), cache, [seq], return_block_indices=True)

    out, blocks = steps(case.cache(20, **pages), alone)

    def work(comm):
        def over(cache, seq, start, stop):
            plan = ShardPlan.zigzag([0, stop - start], comm.size, SMALL.slc_block_len)
            return prefilled(case.rows(range(start, stop)), cache, [seq], plan, comm)

        refused = case.cache(4, **pages, cmp_placement="sharded")
        with pytest.raises(ValueError, match="without page_dtype, or with cmp_placement='replicated'"):
            nsa_decode(*case.batch([[0]]), refused, [refused.new_sequence()], cp_group=comm)
        return steps(case.cache(10, **pages), over, cp_group=comm)

    for mine, chosen in run_threads(3, work):
        torch.testing.assert_close(mine, out, rtol=0, atol=1e-10)
        assert torch.equal(chosen, blocks)
