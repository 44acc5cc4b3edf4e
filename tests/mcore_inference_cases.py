"""Layers and models with a static inference context: importable, because spawned processes find their work by name."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_cases import (
    BATCH,
    HIDDEN,
    SINGLE,
    VARIANTS,
    Layout,
    build_attention,
    expect_error,
    groups,
    make_config,
    share,
    whole,
)
from mcore_model_cases import build, tokens
from nsa_dist import ShardPlan
from nsa_dist.mcore import nsa_block_spec
from nsa_dist.mcore.inference.static import check_context
from ranks import attempted

WORLD = 2
LENGTH = 150
LAYOUTS = {"TP2": Layout(tp=2), "TP2 with sequence parallelism": Layout(tp=2, sequence_parallel=True)}
CUT = ("mlp", "shared K/V")  # variants that are also cut over ranks
EVEN = [0, 60, 62, 64, 100, 108, LENGTH]  # sequence parallelism cuts every chunk


def over_ranks(rank: int) -> dict[str, str]:
    """{what was tried: "" or how it failed on this rank}."""
    results: dict[str, str] = {}
    for name, layout in LAYOUTS.items():
        with groups(layout):
            for variant in CUT:
                work = partial(agrees, layout, VARIANTS[variant], EVEN)
                attempted(results, f"{name}: {variant}", work)
    return results


def context(rows: int = BATCH) -> StaticInferenceContext:
    return StaticInferenceContext(max_batch_size=rows, max_sequence_length=LENGTH)


def inputs() -> Tensor:
    return torch.randn(LENGTH, BATCH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def stepped(work: Callable[[slice], Tensor], cuts, at: StaticInferenceContext) -> Tensor:
    """What a step says of each chunk, as Megatron's loop asks for it."""
    found = []
    for start, stop in pairwise(cuts):
        assert at.sequence_len_offset == start
        found.append(work(slice(start, stop)))
        at.increment_sequence_len_offset(stop - start)
    return torch.cat(found)


def agrees(layout: Layout, changes: dict, cuts) -> None:
    """The layer's own forward over the whole sequence, to 1e-10."""
    attention = build_attention(make_config(layout, **changes)).eval()
    x, at = inputs(), context()

    def put(part: Tensor) -> Tensor:
        return share(part, _plan(len(part)), layout)

    def attend(part: Tensor, **options) -> Tensor:
        out, bias = attention(put(part), None, **options)
        return whole((out if bias is None else out + bias).detach(), _plan(len(part)), layout)

    out = stepped(lambda rows: attend(x[rows], inference_context=at), cuts, at)
    torch.testing.assert_close(out, attend(x), rtol=0, atol=1e-10)


def _plan(length: int) -> ShardPlan:
    """One that leaves tokens as they are."""
    return ShardPlan.contiguous([0, length], 1, 1)


def rows_of_several_batches() -> None:
    """`batch_size_offset` names the rows of a step, and `inference_params` is the older name of a context."""
    attention, x, at = build_attention(make_config()).eval(), inputs(), context()
    expected = attention(x, None)[0]
    for start, stop in pairwise([0, 70, 78, LENGTH]):
        for row in range(BATCH):
            out, _ = attention(x[start:stop, row : row + 1], None, inference_params=at)
            torch.testing.assert_close(out, expected[start:stop, row : row + 1], rtol=0, atol=1e-10)
            at.increment_batch_size_offset(1)
        at.reset_batch_size_offset()
        at.increment_sequence_len_offset(stop - start)


def taken_back_and_begun_anew() -> None:
    attention, x, at = build_attention(make_config()).eval(), inputs(), context()
    expected = attention(x, None)[0]
    for _ in range(2):
        stepped(lambda rows: attention(x[rows].flip(1), None, inference_context=at)[0], [0, 50, 55], at)
        at.reset()
        first = stepped(lambda rows: attention(x[rows], None, inference_context=at)[0], [0, 60, 68], at)
        at.sequence_len_offset = 62
        rest = stepped(lambda rows: attention(x[rows], None, inference_context=at)[0], [62, 70, LENGTH], at)
        torch.testing.assert_close(torch.cat([first[:62], rest]), expected, rtol=0, atol=1e-10)
        at.reset()


def a_whole_model() -> None:
    """With Megatron's own rotary table and masks."""
    model = build(SINGLE, position_embedding_type="rope").eval()
    ids, at = tokens()[:, :LENGTH], context()
    at.materialize_only_last_token_logits = False
    if hasattr(at, "config"):
        at.config.materialize_only_last_token_logits = False
    position = torch.arange(LENGTH).expand(2, -1)
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    with torch.no_grad():
        expected = model(ids, position, None)

        def step(rows: slice) -> Tensor:
            mask = causal[..., rows, : rows.stop]
            return model(
                ids[:, rows], position[:, rows], mask, inference_context=at, runtime_gather_output=True
            ).transpose(0, 1)

        out = stepped(step, [0, 80, *range(81, 90), LENGTH], at).transpose(0, 1)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        last = model(ids, position, None, inference_context=context(), runtime_gather_output=True)
        torch.testing.assert_close(last[:, -1:], expected[:, -1:], rtol=1e-4, atol=1e-5)
        assert last.shape[1] in (1, LENGTH)  # the last alone with 0.16


def refusals() -> None:
    attention, x = build_attention(make_config()), inputs()
    at = context()
    expect_error(lambda: attention(x, None, inference_context=at), "call model.eval")
    attention.eval()
    attention(x[:30], None, inference_context=at)
    at.increment_sequence_len_offset(40)
    expect_error(lambda: attention(x[40:], None, inference_context=at), "call the layer with every token in turn")
    at.sequence_len_offset = 10
    expect_error(lambda: attention(x[10:], None, inference_context=at), "fork it before")
    at.sequence_len_offset = 30
    expect_error(lambda: attention(x[30:], None, inference_context=context(1)), "max_batch_size=2")
    wrong = torch.zeros(1, 1, 10, 40, dtype=torch.bool)
    expect_error(lambda: attention(x[30:40], wrong, inference_context=at), "rows without padding")
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 10]), cu_seqlens_kv=torch.tensor([0, 10]))
    expect_error(
        lambda: attention(x[30:40, :1], None, inference_context=at, packed_seq_params=pack), "packed_seq_params"
    )
    expect_error(lambda: at.swap_key_value_dict([1, 0]), "whose sequences fork, for beams")
    expect_error(lambda: check_context(at, False, 2, "it"), "context_parallel_size=1")
    dense = build(SINGLE, {"nsa_attention": "dense"}, nsa_block_spec).eval()
    ids = tokens()[:, :LENGTH]
    expect_error(lambda: dense(ids, ids, None, inference_context=context()), "the twin that NSA is compared with")


ALONE: dict[str, Callable[[], None]] = {
    **{name: partial(agrees, SINGLE, changes, EVEN) for name, changes in VARIANTS.items()},
    "token by token": partial(agrees, SINGLE, {}, [0, *range(40, LENGTH + 1)]),
    "rows of several batches": rows_of_several_batches,
    "taken back and begun anew": taken_back_and_begun_anew,
    "a whole model": a_whole_model,
    "refusals": refusals,
}
