"""`NSALayer`: over ranks, wrapped by FSDP2, with a cache, and what it refuses."""

import pytest
import torch

from cases import SMALL
from layer_cases import KINDS, LENGTHS, inputs, layer_of, over_ranks
from nsa_dist import BranchKV, ShardPlan, nsa_attention
from nsa_dist.layer import NSALayer
from nsa_dist.rope import rotate
from nsa_dist.rope_scaling import Rotary
from ranks import run_ranks


@pytest.fixture(scope="module")
def results():
    return run_ranks(2, over_ranks)


@pytest.mark.parametrize("name", [*KINDS, "fsdp"])
def test_two_ranks_are_one(results, name):
    assert max(worst[name] for worst in results) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_what_the_whole_gives(kind):
    layer, x = layer_of(kind), inputs()[0]
    expected = layer(x, cu_seqlens=LENGTHS)
    cache = layer.make_cache(12)
    seqs = [cache.new_sequence(), cache.new_sequence()]
    first = layer.prefill(torch.cat([x[:30], x[41:121]]), cache, seqs, [0, 30, 110])
    steps = [layer.decode(torch.stack([x[30 + i : 32 + i], x[121 + i : 123 + i]]), cache, seqs) for i in (0, 2, 4)]
    steps.append(layer.decode(x[36:41][None], cache, [seqs[0], *[]]))
    found = torch.cat([first[:30], *(step[0] for step in steps[:3]), steps[3][0]])
    torch.testing.assert_close(found, expected[:41], rtol=0, atol=1e-10)
    found = torch.cat([first[30:], *(step[1] for step in steps[:3])])
    torch.testing.assert_close(found, expected[41:127], rtol=0, atol=1e-10)


def normed(x: torch.Tensor, kind: str, norm: torch.nn.Module) -> torch.Tensor:
    """Written out, over the last axis."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x if kind == "l2" else x * norm.weight + (norm.bias if kind == "layer" else 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "norms" in kind])
def test_norms_come_first_then_phi_and_positions_and_the_bias_before_the_sigmoid(kind):
    """Against the projections, one formula behind the other; how heads are turned is judged in test_rope.py."""
    layer, x = layer_of(kind), inputs()[0]
    norm, rotary = KINDS[kind]["qk_norm"], KINDS[kind]["rotary"]
    columns = layer.qkv(x).view(160, 2, -1)  # [ 2 * 8 | 3 * (8 + 8) | 2 * 3 ] of each of 2 kv heads
    q = normed(columns[..., :16].reshape(160, 4, 8), norm, layer.q_norm)
    pairs = [columns[..., 16 + 8 * i : 24 + 8 * i] for i in range(6)]
    keys = [normed(k, norm, layer.k_norm[name]) for k, name in zip(pairs[::2], ("cmp", "slc", "win"), strict=True)]
    logits = columns[..., 64:].reshape(160, 4, 3)
    if KINDS[kind].get("gate_bias"):
        logits = logits + layer.gate.bias.reshape(4, 3)
    place = torch.cat([torch.arange(41), torch.arange(119)])
    kv = BranchKV(keys[0], pairs[1], rotate(keys[1], place, rotary), pairs[3], rotate(keys[2], place, rotary), pairs[5])
    out = nsa_attention(
        rotate(q, place, rotary), kv, 1 / (1 + (-logits).exp()), SMALL, cu_seqlens=torch.tensor(LENGTHS),
        compress_k=lambda blocks, start: rotate(blocks.mean(1), start, rotary),
        compress_v=lambda blocks, start: blocks.mean(1),
    )  # fmt: skip
    expected = out.flatten(1) @ layer.proj.weight.T
    torch.testing.assert_close(layer(x, cu_seqlens=LENGTHS), expected, rtol=0, atol=1e-10)


def test_a_batch_is_documents():
    layer, x = layer_of("mlp"), inputs()[0]
    batch = x[:120].view(2, 60, -1)
    assert torch.equal(layer(batch).flatten(0, 1), layer(x[:120], cu_seqlens=[0, 60, 120]))


def test_a_base_is_short_for_a_rotary():
    sizes = {"hidden_size": 16, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    assert NSALayer(**sizes, rotary_base=500.0).rotary == Rotary(500.0)
    with pytest.raises(ValueError, match="are both given, and each has a base; leave rotary_base out"):
        NSALayer(**sizes, rotary_base=500.0, rotary=Rotary(percent=0.5))


def test_refusals():
    layer, x = layer_of("mlp"), inputs()[0]
    for sizes, match in [((24, 3, 2, 8), "divisor of 3"), ((24, 4, 2, 7), "take 8"), ((24, 4, 0, 8), "multiple")]:
        with pytest.raises(ValueError, match=match):
            NSALayer(*sizes)
    with pytest.raises(ValueError, match=r"must be one of rms, layer, l2, or None .*take one"):
        NSALayer(24, 4, 2, 8, qk_norm="batch")
    with pytest.raises(ValueError, match="'mlp' or 'mean'"):
        NSALayer(24, 4, 2, 8, compression="max")
    with pytest.raises(ValueError, match=r"pass x.flatten\(0, 1\)"):
        layer(x[None], cu_seqlens=[0, 160])
    with pytest.raises(ValueError, match="pass that many rows"):
        layer(x, plan=ShardPlan.contiguous([0, 100], 1, 16))
