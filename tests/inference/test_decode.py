"""`nsa_decode` through the kernels made for it, against training's forward: in the interpreter, or on a GPU."""

from contextlib import ExitStack

import pytest
import torch

import nsa_kernels
from cases import SMALL
from inference_cases import Case, Play, Told
from kernels.interpreter import repair
from kernels.judge import assert_twice
from kernels.pace import SLOW_WITHOUT_A_GPU
from kernels.ties import TIE, importance
from nsa_dist import BranchKV, NSAConfig, nsa_attention
from nsa_dist.compress import BlockPlaces, compress_both
from nsa_dist.inference import NSACache, generate, nsa_decode, nsa_prefill
from nsa_dist.inference.captured import CapturedDecode
from nsa_dist.inference.decode import any_whole, decode_step, decoding, slots_of
from nsa_dist.inference.model import GPT, GPTConfig
from nsa_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    repair()

NEEDS_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))


class Rounded(Case):
    """In fp32, on the device; what the cache answers is held to fp64 by the twice rule."""

    def rows(self, tokens):
        q, kv, gates = super().rows(tokens)
        return self.put(q), BranchKV(*map(self.put, kv)), self.put(gates)

    def put(self, x):
        return x.to(DEVICE, torch.float32)

    def cache(self, num_pages, **options):
        q, kv, _ = self.rows([0])
        phis = [phi.to(DEVICE) if isinstance(phi, torch.nn.Module) else phi for phi in self.phis]
        return NSACache(
            self.cfg, kv.k_cmp.shape[1], q.shape[2], kv.v_cmp.shape[2], num_pages, device=DEVICE,
            compress_k=phis[0], compress_v=phis[1], **options,
        )  # fmt: skip

    def trained_in(self, dtype, tokens):
        q, kv, gates = self.rows(tokens)
        with torch.no_grad():
            return nsa_attention(
                q.to(dtype), BranchKV(*(x.to(dtype) for x in kv)), gates.to(dtype), self.cfg,
                compress_k=self.phis[0], compress_v=self.phis[1], ops=reference, return_block_indices=True,
            )  # fmt: skip

    def compare(self, tokens, out, blocks):
        """The last tokens, of which there are answers. Blocks may be others where importances tie within rounding.

        A compressed key across a border gives the same to both blocks (eq. 9), so neighbours tie wherever one key has
        nearly all of the weight: how often is up to what is drawn. Other ties are few.
        """
        first = len(tokens) - len(out)
        exact, expected_blocks = (x[first:] for x in self.trained_in(torch.float64, tokens))
        others, apart = (blocks != expected_blocks).any(-1), 0
        for row, head in others.nonzero().tolist():
            mine, theirs = ({int(block) for block in x[row, head]} for x in (blocks, expected_blocks))
            taken, left = mine - theirs, theirs - mine
            self.check_tie(tokens[: first + row + 1], head, taken, left)
            apart += any(abs(a - b) > 1 for a, b in zip(sorted(taken), sorted(left), strict=True))
        assert apart <= max(1, others.numel() // 100)
        same = ~others.any(-1)
        assert_twice("out", out[same], self.trained_in(torch.float32, tokens)[0][first:][same], exact[same])

    def check_tie(self, tokens, head, taken, left):
        """Of the last token: the importance of a block that was left is that of one that was taken, within rounding."""
        q, kv, _ = (
            x.double() if isinstance(x, torch.Tensor) else BranchKV(*map(torch.Tensor.double, x))
            for x in self.rows(tokens)
        )
        count = self.cfg.num_cmp_blocks(len(tokens))
        start = torch.arange(count, device=DEVICE) * self.cfg.cmp_stride
        at = BlockPlaces(start.int(), start, self.cfg.cmp_block_len)
        keys, _ = compress_both(self.phis, (kv.k_cmp, kv.v_cmp), at, reference)
        q, seen, scale = q[-1:], torch.tensor([count]), q.shape[-1] ** -0.5
        grouped = q.unflatten(1, (keys.shape[1], -1))
        lse = (torch.einsum("thgd,nhd->thgn", grouped, keys) * scale).logsumexp(-1).flatten(1)
        sizes = {
            "cmp_block_len": self.cfg.cmp_block_len, "cmp_stride": self.cfg.cmp_stride,
            "slc_block_len": self.cfg.slc_block_len, "softmax_scale": scale,
        }  # fmt: skip
        zero, position = torch.tensor([0]), torch.tensor([len(tokens) - 1])
        found = importance((q, keys, lse, zero, seen, position, zero), sizes)[0, head]
        ahead, behind = max(found[list(left)]), min(found[list(taken)])
        assert ahead - behind <= TIE * ahead, f"{len(tokens)} tokens, head {head}: {taken} instead of {left}"


class KernelPlay(Play):
    case_type, decode_ops = Rounded, nsa_kernels
    configs = (
        SMALL,
        NSAConfig(16, 4, 16, 6, 2, 2, 33),
        NSAConfig(32, 16, 64, 3, 0, 1, 70),
        NSAConfig(8, 8, 32, 4, 1, 1, 1),
    )
    heads = (4, 2, 16, 16), (3, 1, 32, 16)


def test_forks_truncations_and_empty_slots():
    """Pages are added, copied and given back, a block is retracted and becomes whole again with other tokens."""
    case = Rounded.of(60, SMALL, "mlp", False, seed=2, heads=(2, 1, 16, 16))
    cache = case.cache(20)
    told = {cache.new_sequence(): Told(), cache.new_sequence(): Told()}
    a, b = told
    nsa_prefill(*case.rows(range(30)), cache, [a])
    told[a].tokens = list(range(30))

    def decode(tokens):
        new = [tokens.get(seq) or [0] * len(next(iter(tokens.values()))) for seq in (a, -1, b)]
        slots = [a if a in tokens else -1, -1, b if b in tokens else -1]
        out, blocks = nsa_decode(*case.batch(new), cache, slots, ops=nsa_kernels, return_block_indices=True)
        for slot, seq in ((0, a), (2, b)):
            if seq in tokens:
                told[seq].add(tokens[seq], out[slot], blocks[slot])

    decode({a: [31, 32], b: [1, 2]})
    cache.free(b)
    b = cache.fork(a)
    told[b] = told[a].cut(32)
    cache.truncate(a, 30)
    told[a] = told[a].cut(30)
    told[a].outs, told[a].blocks = [], []
    decode({a: [40, 41], b: [50, 51]})
    for seq in (a, b):
        out, blocks = told[seq].outs, told[seq].blocks
        case.compare(told[seq].tokens, torch.stack(out), torch.stack(blocks))


SEEDS = [pytest.param(seed, marks=SLOW_WITHOUT_A_GPU if seed < 3 else NEEDS_A_GPU) for seed in range(8)]


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_cases(seed):
    KernelPlay(seed, most=120 if seed % 4 else 300, steps=10).run()


@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(part, marks=NEEDS_A_GPU) for part in range(12)])
def test_three_hundred_drawn_cases(part):
    """25 in each part. Without a GPU they would take hours."""
    for seed in range(1000 + 25 * part, 1025 + 25 * part):
        KernelPlay(seed, most=1500 if seed % 10 == 0 else 400, steps=12).run()


def test_slots_are_told_when_they_change():
    """A graph reads them where they are: of a step like the one before nothing is copied."""
    sizes = GPTConfig(2, 32, 2, 1, 16, 48, SMALL, vocab_size=16)
    model = GPT(sizes, device=DEVICE)
    cache = model.make_cache(64, num_sequences=3)
    a, b = (cache.new_sequence() for _ in range(2))
    captured = CapturedDecode(model, cache, 2)
    captured._place([a, -1])
    captured._slots[0].fill_(7)
    captured._place([a, -1])
    assert captured._slots[0].tolist() == [7, 7]
    captured._place([b, a])
    rings = [[layer.state(seq).ring for seq in (b, a)] for layer in cache.layers]
    assert [slots.tolist() for slots in captured._slots] == rings


def gpu_case():
    case = Rounded.of(1500, NSAConfig(num_slc_blocks=6, window_len=200), "mlp", False, seed=1, heads=(8, 2, 64, 64))
    return case, case.cache(80, max_sequences=4, max_tokens=2048)


@pytest.mark.parametrize("new", [pytest.param(new, marks=NEEDS_A_GPU) for new in (1, 3)])
def test_a_graph_stays_valid_while_sequences_grow(new):
    """Bits of replays are those of calls; pages are added, blocks become whole, a sequence takes another's slot."""
    case, cache = gpu_case()
    seqs = [cache.new_sequence() for _ in range(3)]
    nsa_prefill(*case.rows(range(900)), cache, seqs, cu_seqlens=[0, 500, 500, 900])
    others = [cache.fork(seq) for seq in seqs]
    order = [seqs[0], -1, seqs[1], seqs[2]]
    static = case.batch([[0] * new] * 4)
    slots = slots_of(cache, [-1] * 4)
    graphs = {}
    for with_phi in (True, False):
        with decoding(cache, [-1] * 4, new):
            decode_step(*static, cache, slots, nsa_kernels, with_phi=with_phi)
        torch.cuda.synchronize()
        graphs[with_phi] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph.out, graph.blocks = decode_step(*static, cache, slots, nsa_kernels, with_phi=with_phi)
    for step in range(40):
        values = case.batch([[100 + 7 * step + 31 * b + i for i in range(new)] for b in range(4)])
        for target, source in zip((static[0], *static[1], static[2]), (values[0], *values[1], values[2]), strict=True):
            target.copy_(source)
        graph = graphs[step % 3 == 0 or any_whole(cache, order, new)]
        with decoding(cache, order, new):
            slots.copy_(slots_of(cache, order))
            graph.replay()
        theirs = [others[seqs.index(seq)] if seq != -1 else -1 for seq in order]
        expected, expected_blocks = nsa_decode(*values, cache, theirs, return_block_indices=True)
        assert torch.equal(graph.blocks, expected_blocks)
        assert torch.equal(graph.out, expected)
        if step == 20:
            order = [order[3], order[0], order[2], -1]


@pytest.mark.parametrize("prompts", [pytest.param(3, marks=NEEDS_A_GPU)])
def test_text_from_a_graph_is_text_from_calls(prompts, monkeypatch):
    sizes = GPTConfig(
        num_layers=2, hidden_size=64, num_q_heads=4, num_kv_heads=1, head_dim=16, ffn_hidden_size=128, nsa=NSAConfig()
    )
    torch.manual_seed(0)
    model = GPT(sizes, device="cuda")
    given = [[1 + (7 * i) % 250 for i in range(40 * n + 1)] for n in range(prompts)]
    replayed = list(generate.generate(model, given, 100, generate.Sampling(seed=3)))
    monkeypatch.setattr(generate, "can_capture", lambda *_: False)
    assert list(generate.generate(model, given, 100, generate.Sampling(seed=3))) == replayed


def test_a_step_of_launches_is_a_call(monkeypatch):
    """Of a whole model, whose layers share the positions: two layers, one of them without, one empty slot."""
    monkeypatch.setattr("nsa_dist.layer.default_ops", lambda _: nsa_kernels)
    torch.manual_seed(0)
    sizes = GPTConfig(2, 32, 2, 1, 16, 48, SMALL, vocab_size=16, no_rope=[0, 1])
    model = GPT(sizes, device=DEVICE).requires_grad_(False)
    tokens = torch.arange(60, device=DEVICE) % 16
    caches = [model.make_cache(128, num_sequences=3) for _ in range(2)]
    for cache in caches:
        seqs = [cache.new_sequence() for _ in range(2)]
        model.prefill(tokens[:50], cache, seqs, cu_seqlens=[0, 20, 50])
    new = tokens[50:53, None]
    slots = [seqs[0], -1, seqs[1]]
    expected = model.decode(new, caches[0], slots)
    with ExitStack() as stack:
        for layer in caches[1].layers:
            stack.enter_context(decoding(layer, slots, 1))
        got = model.decode_step(new, caches[1], [slots_of(layer, slots) for layer in caches[1].layers])
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
