"""What the ranks of tests/mcore run: importable, because spawned processes find their work by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from nsa_dist import NSAConfig, ShardPlan
from nsa_dist.mcore import NSASelfAttention, NSATransformerConfig, nsa_layer_spec
from nsa_dist.mcore.cpu import megatron_on_cpu
from ranks import attempted

WORLD = 2
TOKENS, BATCH, HIDDEN = 256, 2, 32
SIZES = NSAConfig(8, 4, 16, 4, 1, 2, 20)  # 16 blocks, 4 of them selected

VARIANTS: dict[str, dict] = {
    "mlp": {},
    "mean": {"nsa_compression": "mean"},
    "shared K/V": {"nsa_shared_kv": True},
    "shared K/V, compressed after RoPE": {"nsa_shared_kv": True, "nsa_compress_before_rope": False},
    "compressed after RoPE": {"nsa_compress_before_rope": False},
    "Dk != Dv": {"nsa_v_head_dim": 4},
    "biases": {"add_bias_linear": True},
    "RMS norms of q and k, gates' bias, Llama 3's positions": {
        "qk_layernorm": True, "nsa_gate_bias": True, "use_rope_scaling": True, "nsa_rotary_base": 5e5,
    },
    "LayerNorms of q and k around one, YaRN, shared K/V": {
        "qk_layernorm": True, "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True,
        "nsa_shared_kv": True, "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 64,
    },
    "L2 norms of q and k, half a head turned, mean": {
        "qk_l2_norm": True, "rotary_percent": 0.5, "rotary_seq_len_interpolation_factor": 4, "nsa_compression": "mean",
    },
    "no positions": {"no_rope_freq": [1]},
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the two ranks share the work."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    order: str = "zigzag"


SINGLE = Layout()
LAYOUTS = {
    "CP2 zigzag": Layout(cp=2),
    "CP2 contiguous": Layout(cp=2, order="contiguous"),
    "TP2": Layout(tp=2),
    "TP2 with sequence parallelism": Layout(tp=2, sequence_parallel=True),
}


def make_config(layout: Layout = SINGLE, **changes) -> NSATransformerConfig:
    defaults = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "init_method_std": 0.2,
        "params_dtype": torch.float64,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": layout.tp,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sequence_parallel,
        "nsa": SIZES,
        "nsa_layout": layout.order,
    }
    return NSATransformerConfig(**{**defaults, **changes})


def build_attention(config: NSATransformerConfig, seed: int = 1) -> NSASelfAttention:
    torch.manual_seed(seed)
    attention = build_module(
        nsa_layer_spec(config).submodules.self_attention,
        config=config,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"]),
    )
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "_layernorm" in name:  # the same of all heads
                parameter += torch.linspace(-0.3, 0.4, len(parameter), dtype=parameter.dtype)
    return attention


@contextmanager
def groups(layout: Layout) -> Iterator[None]:
    """Inside, Megatron's process groups are those of `layout`."""
    with megatron_on_cpu():
        parallel_state.initialize_model_parallel(layout.tp, 1, context_parallel_size=layout.cp)
        try:
            tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            yield
        finally:
            parallel_state.destroy_model_parallel()


def everything(rank: int, folder: str) -> dict[str, str]:
    """{what was tried: "" or how it failed on this rank}. New process groups are slow: one set for each layout."""
    results: dict[str, str] = {}
    attempt = partial(attempted, results)

    with groups(SINGLE):
        expected = {variant: attend(SINGLE, changes) for variant, changes in VARIANTS.items()}
        attempt("recompute changes nothing", lambda: assert_equal(expected["recompute"], expected["mlp"]))
        attempt("a pack is its documents one by one", packed_is_one_by_one)
        attempt("a batch is its samples one by one", batch_is_one_by_one)
        attempt("a batch is cut into calls", batch_in_calls)
        attempt("positions of an evaluation serve training", trains_after_inference)
        expected_pack = attend_pack(Layout(order="contiguous"))
        save(SINGLE, Path(folder, "TP1"))
    for name, layout in LAYOUTS.items():
        with groups(layout):
            for variant, changes in VARIANTS.items():
                attempt(f"{name}: {variant}", partial(agrees, layout, changes, expected[variant]))
            attempt(f"{name}: pack", partial(packs_agree, layout, expected_pack))
            if name == "TP2":
                attempt("checkpoint of TP1 in TP2", partial(loads, layout, Path(folder, "TP1")))
                save(layout, Path(folder, "TP2"))
            if name == "CP2 zigzag":
                attempt("recorded blocks", recorded_blocks)
                attempt("lengths that do not divide", refuses_odd_lengths)
                attempt("packs that do not divide", refuses_packs)
    with groups(SINGLE):
        attempt("checkpoint of TP2 in TP1", partial(loads, SINGLE, Path(folder, "TP2")))
    return results


def attend(layout: Layout, changes: dict) -> dict[str, Tensor]:
    """Output and every gradient of the layer, put together from the ranks: the whole sequence, all heads."""
    config = make_config(layout, **changes)
    attention = build_attention(config)
    generator = torch.Generator().manual_seed(2)
    x, upstream = torch.randn(2, TOKENS, BATCH, HIDDEN, dtype=torch.float64, generator=generator)
    plan = getattr(ShardPlan, layout.order)([0, TOKENS], layout.cp, config.nsa.slc_block_len)
    mine = share(x, plan, layout).requires_grad_()
    out, bias = attention(mine, None)
    out = out if bias is None else out + bias
    (out * share(upstream, plan, layout)).sum().backward()
    result = {"out": whole(out.detach(), plan, layout), "dx": whole(mine.grad, plan, layout)}
    for name, parameter in attention.named_parameters():
        result[f"d {name}"] = whole_gradient(parameter, layout, of_heads="_layernorm" in name)
    return result


def share(x: Tensor, plan: ShardPlan, layout: Layout) -> Tensor:
    local = plan.shard(x, parallel_state.get_context_parallel_rank())
    if layout.sequence_parallel:
        local = local.chunk(layout.tp)[parallel_state.get_tensor_model_parallel_rank()]
    return local.clone()


def whole(x: Tensor, plan: ShardPlan, layout: Layout) -> Tensor:
    if layout.sequence_parallel:
        x = torch.cat(gathered(x, parallel_state.get_tensor_model_parallel_group()))
    return plan.unshard(gathered(x, parallel_state.get_context_parallel_group()))


def whole_gradient(parameter: torch.nn.Parameter, layout: Layout, of_heads: bool = False) -> Tensor:
    grad = parameter.grad.clone()
    dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
    group = parallel_state.get_tensor_model_parallel_group()
    if getattr(parameter, "tensor_model_parallel", False):
        return torch.cat(gathered(grad, group), parameter.partition_dim)
    if layout.sequence_parallel or of_heads:  # the output bias: each rank saw its own tokens; norms: its own heads
        dist.all_reduce(grad, group=group)
    return grad


def gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def agrees(layout: Layout, changes: dict, expected: dict[str, Tensor]) -> None:
    got = attend(layout, changes)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert value.abs().max() > 0, f"{name} is all zero: this proves nothing"


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def packed_is_one_by_one() -> None:
    attention = build_attention(make_config())
    lengths = [1, 31, 50, 65]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.randn(sum(lengths), 1, HIDDEN, dtype=torch.float64)
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    shown = []
    with attention.core_attention.observing(lambda *values: shown.append(values)):
        together, _ = attention(x, None, packed_seq_params=pack)
        alone = [attention(document, None)[0] for document in x.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    of_pack, *of_documents = shown
    for got, expected in zip(of_pack, zip(*of_documents, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-12, atol=1e-12)


def batch_is_one_by_one() -> None:
    """Output, gradients, and what is shown to who watches: samples whose last block is not full."""
    attention = build_attention(make_config(), seed=1)
    x, upstream = torch.randn(2, 100, 3, HIDDEN, dtype=torch.float64)
    together, seen = _watched(attention, x, upstream)
    alone = [_watched(attention, x[:, i : i + 1], upstream[:, i : i + 1]) for i in range(3)]
    for name in ("out", "dx"):
        torch.testing.assert_close(together[name], torch.cat([a[name] for a, _ in alone], 1), rtol=1e-12, atol=1e-12)
    for name in together.keys() - {"out", "dx"}:
        torch.testing.assert_close(together[name], sum(a[name] for a, _ in alone), rtol=1e-12, atol=1e-12)
    for i, (_, its) in enumerate(alone):
        assert torch.equal(seen["recorded"][i], its["recorded"][0])
        for name in ("blocks", "own"):
            assert torch.equal(seen[name][0].chunk(3)[i], its[name][0])
        torch.testing.assert_close(seen["gates"][0].chunk(3)[i], its["gates"][0], rtol=1e-12, atol=1e-12)
        assert its["own"][0].tolist() == [n // SIZES.slc_block_len for n in range(100)]


def batch_in_calls() -> None:
    """Where a batch is too large for one call: the same, in calls of as many samples as divide it."""
    attention = build_attention(make_config(), seed=1)
    x, upstream = torch.randn(2, 32, 6, HIDDEN, dtype=torch.float64)
    calls, attend_call = [], attention.core_attention._attend

    def noted(q: Tensor, *rest: object) -> Tensor:
        calls.append(len(q))
        return attend_call(q, *rest)

    expected, _ = _watched(attention, x, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_dist.cp.formulas.batches.MOST_TOGETHER", 5 * 32 * 32)  # 5 samples, and 3 divide 6
        patch.setattr(attention.core_attention, "_attend", noted)
        got, _ = _watched(attention, x, upstream)
    assert calls == [3 * 32] * 2
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


def _watched(attention: NSASelfAttention, x: Tensor, upstream: Tensor) -> tuple[dict[str, Tensor], dict[str, list]]:
    """(output and gradients, what was shown) of one forward and backward."""
    x, seen = x.clone().requires_grad_(), {"gates": [], "blocks": [], "own": []}

    def observe(gates: Tensor, blocks: Tensor, own: Tensor) -> None:
        for name, values in (("gates", gates), ("blocks", blocks), ("own", own)):
            seen[name].append(values)

    attention.zero_grad()
    with attention.core_attention.observing(observe), attention.core_attention.recording_blocks() as recorded:
        out, _ = attention(x, None)
    (out * upstream).sum().backward()
    grads = {f"d {name}": parameter.grad.clone() for name, parameter in attention.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, **grads}, {**seen, "recorded": recorded}


def trains_after_inference() -> None:
    attention = build_attention(make_config())
    x = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        attention(x, None)
    attention(x, None)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def attend_pack(layout: Layout) -> Tensor:
    """The layer's output for three documents, in packed order."""
    bounds = torch.tensor([0, 64, 192, 256], dtype=torch.int32)
    make_plan = ShardPlan.contiguous if layout.order == "contiguous" else ShardPlan.zigzag_documents
    plan = make_plan(bounds, layout.cp, SIZES.slc_block_len)
    x = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    out, _ = build_attention(make_config(layout))(share(x, plan, layout), None, packed_seq_params=pack)
    return whole(out.detach(), plan, layout)


def packs_agree(layout: Layout, expected: Tensor) -> None:
    torch.testing.assert_close(attend_pack(layout), expected, rtol=1e-10, atol=1e-10)


def save(layout: Layout, path: Path, changes: dict | None = None) -> None:
    path.mkdir(exist_ok=True)
    dist.barrier()
    attention = build_attention(make_config(layout, **(changes or {})))
    dist_checkpointing.save(attention.sharded_state_dict(), str(path))


def loads(layout: Layout, path: Path, changes: dict | None = None) -> None:
    """What another layout saved is what this one would have been built with."""
    config = make_config(layout, **(changes or {}))
    other, expected = build_attention(config, seed=9), build_attention(config)
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(path)))
    for (name, got), wanted in zip(other.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, wanted), name


def recorded_blocks() -> None:
    config = make_config(Layout(cp=2))
    attention = build_attention(config)
    x = torch.randn(TOKENS // 2, BATCH, HIDDEN, dtype=torch.float64)
    with attention.core_attention.recording_blocks() as recorded:
        attention(x, None)
    attention(x, None)
    assert [tuple(blocks.shape) for blocks in recorded] == [(TOKENS // 2, 2, 4)] * BATCH
    own = ShardPlan.zigzag([0, TOKENS], 2, 16).positions(parallel_state.get_context_parallel_rank()) // 16
    for blocks in recorded:
        assert (blocks.amax(-1) == own[:, None]).all(), "a query's own block is its last"


def refuses_odd_lengths() -> None:
    attention = build_attention(make_config(Layout(cp=2)))
    expect_error(lambda: attention(torch.zeros(100, 1, HIDDEN, dtype=torch.float64), None), "pad the batch to 256")


def refuses_packs() -> None:
    attention = build_attention(make_config(Layout(cp=2)))
    x = torch.zeros(128, 1, HIDDEN, dtype=torch.float64)
    for bounds, remedy in (([0, 100, 256], "pad each document to a multiple of 64"), ([0, 128], "ends at 256")):
        pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32))
        expect_error(lambda pack=pack: attention(x, None, packed_seq_params=pack), remedy)


def expect_error(work: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        work()
