"""`NSALayer`: over ranks, wrapped by FSDP2, with a cache, and what it refuses."""

import pytest
import torch

from layer_cases import KINDS, LENGTHS, inputs, layer_of, over_ranks
from nsa_dist import ShardPlan
from nsa_dist.layer import NSALayer
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


def test_a_batch_is_documents():
    layer, x = layer_of("mlp"), inputs()[0]
    batch = x[:120].view(2, 60, -1)
    assert torch.equal(layer(batch).flatten(0, 1), layer(x[:120], cu_seqlens=[0, 60, 120]))


def test_refusals():
    layer, x = layer_of("mlp"), inputs()[0]
    for sizes, match in [((24, 3, 2, 8), "divisor of 3"), ((24, 4, 2, 7), "take 8"), ((24, 4, 0, 8), "multiple")]:
        with pytest.raises(ValueError, match=match):
            NSALayer(*sizes)
    with pytest.raises(ValueError, match="'mlp' or 'mean'"):
        NSALayer(24, 4, 2, 8, compression="max")
    with pytest.raises(ValueError, match=r"pass x.flatten\(0, 1\)"):
        layer(x[None], cu_seqlens=[0, 160])
    with pytest.raises(ValueError, match="pass that many rows"):
        layer(x, plan=ShardPlan.contiguous([0, 100], 1, 16))
