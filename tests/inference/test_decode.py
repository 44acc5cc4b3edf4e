"""`nsa_decode` through the kernels made for it, against training's forward: in the interpreter, or on a GPU as it is."""

import pytest
import torch

import nsa_kernels
from cases import SMALL
from inference_cases import Case, Play
from kernels.interpreter import repair
from kernels.judge import assert_twice
from nsa_dist import BranchKV, NSAConfig, nsa_attention
from nsa_dist.inference import NSACache, nsa_decode
from nsa_dist.inference.decode import decode_step, decoding, paged, slots_of
from nsa_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    repair()


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
        exact, expected_blocks = self.trained_in(torch.float64, tokens)
        assert torch.equal(blocks, expected_blocks)
        assert_twice("out", out, self.trained_in(torch.float32, tokens)[0], exact)


class KernelPlay(Play):
    case_type, decode_ops = Rounded, nsa_kernels
    configs = SMALL, NSAConfig(16, 4, 16, 6, 2, 2, 33), NSAConfig(32, 16, 64, 3, 0, 1, 70), NSAConfig(8, 8, 32, 4, 1, 1, 1)
    heads = (4, 2, 16, 16), (3, 1, 32, 16)


@pytest.mark.parametrize("seed", range(8))
def test_drawn_cases(seed):
    KernelPlay(seed, most=120 if seed % 4 else 300, steps=10).run()


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(3))
def test_three_hundred_drawn_cases(hundred):
    for seed in range(1000 + 100 * hundred, 1100 + 100 * hundred):
        KernelPlay(seed, most=1500 if seed % 10 == 0 else 400, steps=12).run()
