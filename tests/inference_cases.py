"""Cases drawn by seed: what is done to the sequences of a cache, and what training's forward says of each."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from cases import SMALL, Inputs, make_inputs
from nsa_dist import BranchKV, NSAConfig, nsa_attention
from nsa_dist.compress import Compress, CompressMLP, MeanCompress, TurnedCompressMLP
from nsa_dist.inference import NSACache, nsa_decode, nsa_prefill
from nsa_dist.rope import rotate
from nsa_dist.rope_scaling import Rotary

CONFIGS = (SMALL, NSAConfig(4, 4, 8, 4, 0, 1, 5), NSAConfig(16, 4, 8, 6, 2, 2, 33), NSAConfig(8, 8, 32, 3, 1, 1, 1))


KINDS = ("mlp", "turned", "turned by itself", "mean", "mean turned", "callable")


class Turned(CompressMLP):
    """A phi of somebody else's that depends on where its block begins."""

    def forward(self, x, block_start, block_rows=None, **options):
        return rotate(super().forward(x, block_start, block_rows, **options), block_start, Rotary(100.0))


def last_token(x: Tensor, block_start: Tensor) -> Tensor:
    """A phi that is any callable."""
    return x[:, -1] * (1 + block_start[:, None, None] % 5)


@dataclass
class Case:
    """Tokens to draw from, and a cache; `kind`: one of `KINDS`."""

    inputs: Inputs
    cfg: NSAConfig
    kind: str
    phis: tuple[Compress | None, Compress | None]

    @classmethod
    def of(cls, num_tokens: int, cfg: NSAConfig, kind: str, shared_kv: bool, seed: int, heads=(4, 2, 8, 6)) -> "Case":
        inputs = make_inputs(num_tokens, *heads, cfg=cfg, seed=seed)
        if shared_kv:
            inputs.kv = BranchKV(*inputs.kv[:2] * 3)
        phi_k = inputs.phi_k
        if kind in ("turned", "turned by itself"):
            sizes = heads[1], heads[2], cfg.cmp_block_len, 2 * heads[2]
            phi_k = Turned(*sizes) if kind == "turned by itself" else TurnedCompressMLP(*sizes, rotary=Rotary(50.0))
            phi_k.to(torch.float64).load_state_dict(inputs.phi_k.state_dict())
        phis = {
            "mean": (None, None),
            "mean turned": (MeanCompress(cfg.cmp_block_len, Rotary(50.0)), None),
            "callable": (last_token, None),
        }.get(kind, (phi_k, inputs.phi_v))
        return cls(inputs, cfg, kind, phis)

    def cache(self, num_pages: int, dtype=torch.float64, **options) -> NSACache:
        heads, dim_k, dim_v = self.inputs.kv.k_cmp.shape[1], self.inputs.q.shape[-1], self.inputs.kv.v_cmp.shape[-1]
        return NSACache(
            self.cfg, heads, dim_k, dim_v, num_pages, dtype=dtype, compress_k=self.phis[0], compress_v=self.phis[1],
            **options,
        )  # fmt: skip

    def rows(self, tokens: Sequence[int]) -> tuple[Tensor, BranchKV, Tensor]:
        """q, kv, gates of these tokens."""
        index = torch.tensor(tokens, dtype=torch.int64)
        q, *kv, gates = (x.detach().index_select(0, index) for x in self.inputs.leaves())
        return q, BranchKV(*kv), gates

    def batch(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, BranchKV, Tensor]:
        """The same as [B, new, ...]."""
        q, kv, gates = self.rows([token for row in tokens for token in row])
        shape = len(tokens), len(tokens[0])
        return q.unflatten(0, shape), BranchKV(*(x.unflatten(0, shape) for x in kv)), gates.unflatten(0, shape)

    def trained(self, tokens: Sequence[int], ops: ModuleType | None = None) -> tuple[Tensor, Tensor]:
        """out and block_indices of training's forward."""
        with torch.no_grad():
            return nsa_attention(
                *self.rows(tokens), self.cfg, compress_k=self.phis[0], compress_v=self.phis[1], ops=ops,
                return_block_indices=True,
            )  # fmt: skip

    def compare(self, tokens: Sequence[int], out: Tensor, blocks: Tensor) -> None:
        """What the cache answered, with training's forward."""
        expected, expected_blocks = self.trained(tokens)
        assert torch.equal(blocks, expected_blocks)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@dataclass
class Told:
    """What the cache was given of a sequence, and what it answered."""

    tokens: list[int] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)
    longest: int = 0

    def add(self, tokens: Sequence[int], out: Tensor, blocks: Tensor) -> None:
        self.tokens += tokens
        self.outs += out
        self.blocks += blocks
        self.longest = max(self.longest, len(self.tokens))

    def cut(self, length: int) -> "Told":
        return Told(self.tokens[:length], self.outs[:length], self.blocks[:length], self.longest)

    def check(self, case: Case) -> None:
        if self.tokens:
            case.compare(self.tokens, torch.stack(self.outs), torch.stack(self.blocks))


class Play:
    """One drawn case: `steps` things done to a few sequences of at most `most` tokens."""

    case_type: type[Case] = Case
    configs: Sequence[NSAConfig] = CONFIGS
    heads: Sequence[tuple[int, int, int, int]] = ((4, 2, 8, 6), (3, 1, 4, 8), (2, 2, 6, 6))
    decode_ops: ModuleType | None = None
    options: Mapping[str, Any] = MappingProxyType({})  # of the cache

    def __init__(self, seed: int, most: int, steps: int) -> None:
        self.rng = rng = random.Random(seed)
        self.case = self.case_type.of(
            most, rng.choice(self.configs), rng.choice(KINDS), rng.random() < 0.3,
            seed, rng.choice(self.heads),
        )  # fmt: skip
        self.most, self.steps = most, steps
        self.cache = self.case.cache(7 * -(-most // self.case.cfg.slc_block_len), **self.options)
        self.told: dict[int, Told] = {}

    def run(self) -> None:
        for _ in range(self.steps):
            if not self.told or (len(self.told) < 6 and self.rng.random() < 0.3):
                self.told[self.cache.new_sequence()] = Told()
            self.rng.choice([self.prefill, self.prefill, self.decode, self.decode, self.fork, self.back, self.free])()
            assert {seq: self.cache.length(seq) for seq in self.told} == {
                s: len(t.tokens) for s, t in self.told.items()
            }
        for told in self.told.values():
            told.check(self.case)
        for seq in self.told:
            self.cache.free(seq)
        assert self.cache.num_free_pages == 7 * -(-self.most // self.case.cfg.slc_block_len)

    def some(self) -> list[int]:
        return self.rng.sample(sorted(self.told), self.rng.randint(1, len(self.told)))

    def draw(self, count: int) -> list[int]:
        return [self.rng.randrange(self.most) for _ in range(count)]

    def room(self, seq: int) -> int:
        return self.most - len(self.told[seq].tokens)

    def prefill(self) -> None:
        seqs = self.some()
        chunks = [self.draw(self.rng.randint(0, self.room(seq)) // self.rng.choice([1, 2, 8])) for seq in seqs]
        bounds = [0]
        for chunk in chunks:
            bounds.append(bounds[-1] + len(chunk))
        rows = self.case.rows([token for chunk in chunks for token in chunk])
        out, blocks = self.prefilled(rows, seqs, bounds)
        for seq, chunk, start, stop in zip(seqs, chunks, bounds, bounds[1:], strict=False):
            self.told[seq].add(chunk, out[start:stop], blocks[start:stop])

    def decode(self) -> None:
        for _ in range(self.rng.randint(1, 6)):
            new = self.rng.randint(1, 8)
            seqs = [seq for seq in self.some() if self.room(seq) >= new]
            if not seqs:
                return
            seqs += [-1] * self.rng.randint(0, 2)
            self.rng.shuffle(seqs)
            tokens = [self.draw(new) for _ in seqs]
            out, blocks = self.decoded(self.case.batch(tokens), seqs)
            for slot, seq in enumerate(seqs):
                if seq == -1:
                    assert not out[slot].any()
                    assert (blocks[slot] == -1).all()
                else:
                    self.told[seq].add(tokens[slot], out[slot], blocks[slot])

    def prefilled(self, rows: tuple[Tensor, BranchKV, Tensor], seqs: list[int], bounds: list[int]):
        return nsa_prefill(*rows, self.cache, seqs, cu_seqlens=bounds, return_block_indices=True)

    def decoded(self, batch: tuple[Tensor, BranchKV, Tensor], seqs: list[int]):
        return nsa_decode(*batch, self.cache, seqs, return_block_indices=True, ops=self.decode_ops)

    def fork(self) -> None:
        if len(self.told) < 6:
            seq = self.rng.choice(sorted(self.told))
            told = self.told[seq]
            self.told[self.cache.fork(seq)] = replace(told.cut(len(told.tokens)))

    def back(self) -> None:
        seq = self.rng.choice(sorted(self.told))
        told = self.told[seq]
        length = self.rng.randint(min(len(told.tokens), max(0, told.longest - 8)), len(told.tokens))
        self.cache.truncate(seq, length)
        self.told[seq] = told.cut(length)

    def free(self) -> None:
        seq = self.rng.choice(sorted(self.told))
        self.told.pop(seq).check(self.case)
        self.cache.free(seq)
