"""What two ranks do with dense layers: importable, because spawned processes find their work by name."""

from functools import partial
from pathlib import Path

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_cases import (
    BATCH,
    HIDDEN,
    SINGLE,
    TOKENS,
    Layout,
    agrees,
    assert_equal,
    attend,
    build_attention,
    groups,
    loads,
    make_config,
    save,
)
from mcore_model_cases import build
from nsa_dist.rope import rotate
from nsa_dist.rope_scaling import Llama3Scaling, Rotary
from ranks import attempted

WORLD = 2
DENSE = {"nsa_attention": "dense"}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "shared K/V": {"nsa_shared_kv": True},
    "Dk != Dv": {"nsa_v_head_dim": 4},
    "biases": {"add_bias_linear": True},
    "mean": {"nsa_compression": "mean"},
}
LAYOUTS = {"TP2": Layout(tp=2), "TP2 with sequence parallelism": Layout(tp=2, sequence_parallel=True)}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


def everything(rank: int, folder: str) -> dict[str, str]:
    """{what was tried: "" or how it failed on this rank}."""
    results: dict[str, str] = {}
    attempt = partial(attempted, results)

    with groups(SINGLE):
        expected = {name: attend(SINGLE, {**DENSE, **changes}) for name, changes in VARIANTS.items()}
        recomputed = partial(attend, SINGLE, {**DENSE, **RECOMPUTE})
        attempt("recompute changes nothing", lambda: assert_equal(recomputed(), expected["plain"]))
        attempt("it is causal softmax attention", is_softmax)
        recipe = {"qk_layernorm": True, "use_rope_scaling": True}
        attempt("with norms and Llama 3's positions", partial(is_softmax, recipe, Rotary(scaling=Llama3Scaling())))
        attempt("without positions", partial(is_softmax, {"no_rope_freq": [1]}, Rotary(percent=0)))
        attempt("documents of a pack are apart", packed_is_one_by_one)
        for name, changes in VARIANTS.items():
            attempt(f"drawn as its twin: {name}", partial(drawn_alike, SINGLE, changes))
        save(SINGLE, Path(folder, "TP1"), DENSE)
    for layout_name, layout in LAYOUTS.items():
        with groups(layout):
            for name, changes in VARIANTS.items():
                attempt(f"{layout_name}: {name}", partial(agrees, layout, {**DENSE, **changes}, expected[name]))
            if layout_name == "TP2":
                attempt("drawn as its twin: TP2", partial(drawn_alike, layout, {}))
                attempt("checkpoint of TP1 in TP2", partial(loads, layout, Path(folder, "TP1"), DENSE))
    return results


PROMISES = [
    "recompute changes nothing",
    "it is causal softmax attention",
    "with norms and Llama 3's positions",
    "without positions",
    "documents of a pack are apart",
    *(f"drawn as its twin: {name}" for name in [*VARIANTS, "TP2"]),
    *(f"{layout}: {name}" for layout in LAYOUTS for name in VARIANTS),
    "checkpoint of TP1 in TP2",
]


PLAIN = Rotary()


def is_softmax(changes: dict | None = None, rotary: Rotary = PLAIN) -> None:
    """Written out, from the projections of the layer."""
    layer = build_attention(make_config(**DENSE, **(changes or {})))
    x = torch.randn(TOKENS, BATCH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q, k, v = layer.linear_qkv(x)[0].view(TOKENS, BATCH, 2, 32).split([16, 8, 8], -1)
    q = q.reshape(TOKENS, BATCH, 4, 8)
    if layer.config.qk_layernorm:
        weights = layer.q_layernorm.weight, layer.k_layernorm["dense"].weight
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w for y, w in zip((q, k), weights, strict=True))
    position, out = torch.arange(TOKENS), []
    for sample in range(BATCH):
        turned_q, turned_k = (rotate(y[:, sample], position, rotary) for y in (q, k))
        for head in range(4):
            scores = turned_q[:, head] @ turned_k[:, head // 2].T / 8**0.5
            scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v[:, sample, head // 2])
    expected, _ = layer.linear_proj(torch.stack(out, 1).view(TOKENS, BATCH, 32))
    torch.testing.assert_close(layer(x, None)[0], expected, rtol=1e-10, atol=1e-10)


def packed_is_one_by_one() -> None:
    attention = build_attention(make_config(**DENSE))
    lengths = [1, 31, 50, 65]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(lengths), 1, HIDDEN, dtype=torch.float64)
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    together, _ = attention(x, None, packed_seq_params=pack)
    alone = [attention(document, None)[0] for document in x.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def drawn_alike(layout: Layout, changes: dict) -> None:
    """Every weight that a model with NSA has as well is the same to the bit, and all of it is drawn anew."""
    nsa, dense = (_weights(layout, {**changes, "nsa_attention": kind}) for kind in ("nsa", "dense"))
    assert {name for name in nsa if "compress" not in name} == dense.keys()
    for name, weight in dense.items():
        expected = nsa[name]
        if name.endswith("linear_qkv.weight"):
            expected = _rows_of_the_twin(expected, layout, changes)
        elif name.endswith("linear_qkv.bias"):
            expected = torch.zeros_like(weight)
        assert torch.equal(weight, expected), name
    drawn = [weight for name, weight in dense.items() if "norm" not in name and "bias" not in name]
    assert all(weight.std() > 0 for weight in drawn)


def _weights(layout: Layout, changes: dict) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in build(layout, changes).named_parameters()}


def _rows_of_the_twin(wide: Tensor, layout: Layout, changes: dict) -> Tensor:
    """Of [q: 2 * 8 | cmp | slc | win | gates: 6] of each key/value head: q, and slc's or the only pair."""
    pair = 8 + changes.get("nsa_v_head_dim", 8)
    first = 16 if changes.get("nsa_shared_kv") else 16 + pair
    heads = wide.unflatten(0, (2 // layout.tp, -1))
    return torch.cat([heads[:, :16], heads[:, first : first + pair]], 1).flatten(0, 1)
