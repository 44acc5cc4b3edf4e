"""Packs over two ranks: both orders in which Megatron cuts them, what is written to them, what ranks disagree about."""

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from mcore_cases import (
    HIDDEN,
    SINGLE,
    SIZES,
    Layout,
    build_attention,
    expect_error,
    gathered,
    groups,
    make_config,
    share,
    whole,
    whole_gradient,
)
from nsa_dist import ShardPlan
from nsa_dist.cp.comm import Comm, Traffic
from nsa_dist.cp.formulas.deals import dealt_bytes, dealt_tokens
from nsa_dist.mcore import prepare_pack
from nsa_dist.mcore.plans import Place, plan_pack
from ranks import attempted

WORLD = 2
CP2 = Layout(cp=2)
CONTIGUOUS = Layout(cp=2, order="contiguous")
INTER_DOCUMENT = {"dataloader_inter_document_masking": True}
PACKS = {
    "blocks that divide": [64, 128, 64],
    "documents of any length": [1, 31, 50, 65, 109],
    "one long, many short": [200, *[4] * 14],
    "a document on each side of a cut": [63, 66, 127],
    "one document": [256],
    "a row that is no multiple of blocks": [100, 40, 8],
}
VARIANTS: dict[str, dict] = {
    "": {},
    "shared K/V": {"nsa_shared_kv": True},
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "biases": {"add_bias_linear": True},
}


def pack_of(bounds: list[int] | Tensor, **others) -> PackedSeqParams:
    cu = torch.as_tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(**{"qkv_format": "thd", "cu_seqlens_q": cu, "cu_seqlens_kv": cu, **others})


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def megatron_arguments(**others) -> dict:
    """Those of `get_batch_on_this_cp_rank` that the installed Megatron knows."""
    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    return {name: value for name, value in {"is_hybrid_cp": False, **others}.items() if name in known}


def cut_by_megatron(x: Tensor) -> Tensor:
    """x [s, 1, h] as Megatron's own function cuts it with inter-document masking."""
    batch = {"tokens": x.transpose(0, 1).contiguous()}
    arguments = megatron_arguments(use_per_sequence_balancing=True)
    if arguments:
        batch["cu_seqlens"] = torch.tensor([[0, x.shape[0]]], dtype=torch.int32)
    cut = get_batch_on_this_cp_rank(batch, cp_group=parallel_state.get_context_parallel_group(), **arguments)
    return cut["tokens"].transpose(0, 1).contiguous()


def attend_row(layout: Layout, lengths: list[int], changes: dict, cut: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Output and gradients of a pack, in packed order, of a layer that was given `cut` of the row."""
    attention = build_attention(make_config(layout, **changes))
    generator = torch.Generator().manual_seed(5)
    x, upstream = torch.randn(2, sum(lengths), 1, HIDDEN, dtype=torch.float64, generator=generator)
    position = cut(torch.arange(sum(lengths), dtype=torch.float64)[:, None, None]).flatten().long()
    mine = cut(x).requires_grad_()
    out, bias = attention(mine, None, packed_seq_params=pack_of(bounds_of(lengths)))
    out = out if bias is None else out + bias
    (out * cut(upstream)).sum().backward()

    def in_order(local: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        return torch.cat(gathered(local, group))[torch.cat(gathered(position, group)).argsort()]

    gradients = {f"d {name}": whole_gradient(p, layout) for name, p in attention.named_parameters()}
    return {"out": in_order(out.detach()), "dx": in_order(mine.grad), **gradients}


def everything(rank: int) -> dict[str, str]:
    """{what was tried: "" or how it failed on this rank}."""
    results: dict[str, str] = {}
    attempt = partial(attempted, results)

    cases = [(p, v) for p in PACKS for v in VARIANTS if not v or p == "documents of any length"]
    with groups(SINGLE):
        expected = {case: attend_row(SINGLE, PACKS[case[0]], VARIANTS[case[1]], torch.clone) for case in cases}
        for name, work in WRITES.items():
            attempt(f"one rank: {name}", lambda work=work: work(SINGLE))
    with groups(CP2):
        for case in cases:
            attempt(f"sequence: {case}", lambda case=case: agrees(case, expected[case]))
        for pack in PACKS:
            attempt(f"chunks: {pack}", lambda pack=pack: agrees_in_chunks(pack, expected[pack, ""]))
        for name, work in {**WRITES, **OVER_RANKS}.items():
            attempt(f"two ranks: {name}", lambda work=work: work(CP2))
    return results


def in_chunks(x: Tensor) -> Tensor:
    """x [s, 1, h] in one chunk a rank, wherever documents end."""
    return x.chunk(WORLD)[parallel_state.get_context_parallel_rank()]


def agrees(case: tuple[str, str], expected: dict[str, Tensor]) -> None:
    got = attend_row(CP2, PACKS[case[0]], {**INTER_DOCUMENT, **VARIANTS[case[1]]}, cut_by_megatron)
    are_equal(got, expected)


def agrees_in_chunks(pack: str, expected: dict[str, Tensor]) -> None:
    are_equal(attend_row(CONTIGUOUS, PACKS[pack], {}, in_chunks), expected)


def are_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert value.abs().max() > 0, f"{name} is all zero: this proves nothing"


# --- what is written to a pack -----------------------------------------------------------------------------------

FIRST, SECOND = [0, 64, 256], [0, 128, 256]


def fixture(layout: Layout) -> tuple:
    """A layer, and what it gives for `FIRST` and for `SECOND`, by packs that nothing else has seen."""
    attention = build_attention(make_config(layout))
    x = torch.randn(256, 1, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def run(pack: PackedSeqParams) -> Tensor:
        bounds = pack.cu_seqlens_q_padded if pack.cu_seqlens_q_padded is not None else pack.cu_seqlens_q
        plan = ShardPlan.zigzag_documents(bounds.flatten(), layout.cp, SIZES.slc_block_len)
        with torch.no_grad():
            out, _ = attention(share(x, plan, layout), None, packed_seq_params=pack)
        return whole(out, plan, layout)

    first, second = run(pack_of(FIRST)), run(pack_of(SECOND))
    assert (first - second).abs().max() > 0.1, "the packs give the same: this proves nothing"
    return run, first, second


def follows(change: Callable[[PackedSeqParams], PackedSeqParams | None]) -> Callable[[Layout], None]:
    """A test that a layer sees what `change` makes of a pack of `FIRST`: `SECOND`."""

    def test(layout: Layout) -> None:
        run, first, second = fixture(layout)
        pack = pack_of(FIRST)
        assert torch.equal(run(pack), first)
        changed = change(pack) or pack
        assert torch.equal(run(changed), second), "the layer did not follow"
        assert torch.equal(run(changed), second)

    return test


def replaced(pack: PackedSeqParams) -> None:
    pack.cu_seqlens_q = pack.cu_seqlens_kv = torch.tensor(SECOND, dtype=torch.int32)


def written(pack: PackedSeqParams) -> None:
    pack.cu_seqlens_q.copy_(torch.tensor(SECOND))


def written_element(pack: PackedSeqParams) -> None:
    pack.cu_seqlens_q[1] = 128


def written_behind(pack: PackedSeqParams) -> None:
    pack.cu_seqlens_q.data[1] = 128


def written_by_numpy(pack: PackedSeqParams) -> None:
    pack.cu_seqlens_q.numpy()[1] = 128


def padded_bounds(pack: PackedSeqParams) -> None:
    pack.cu_seqlens_q_padded = pack.cu_seqlens_kv_padded = torch.tensor(SECOND, dtype=torch.int32)
    pack.cu_seqlens_q = pack.cu_seqlens_kv = torch.tensor([0, 60, 180], dtype=torch.int32)


def copied_and_written(pack: PackedSeqParams) -> PackedSeqParams:
    other = copy.deepcopy(pack)
    other.cu_seqlens_q.copy_(torch.tensor(SECOND))
    return other


def shallow_copied(pack: PackedSeqParams) -> PackedSeqParams:
    other = copy.copy(pack)
    replaced(other)
    return other


def at_the_same_address(layout: Layout) -> None:
    run, first, second = fixture(layout)
    for _ in range(20):  # the interpreter gives a freed object's memory to the next of its size
        assert torch.equal(run(pack_of(FIRST)), first)
        assert torch.equal(run(pack_of(SECOND)), second)


def keeps_its_plan(layout: Layout) -> None:
    """Layers of one pack, and several packs in turn as pipelines have them, work each plan out once."""
    run, first, second = fixture(layout)
    one, other = pack_of(FIRST), pack_of(SECOND)
    run(one), run(other)
    plans = [next(iter(pack._nsa_plans.values()))[1] for pack in (one, other)]
    for _ in range(3):
        assert torch.equal(run(one), first)
        assert torch.equal(run(other), second)
    assert [next(iter(pack._nsa_plans.values()))[1] for pack in (one, other)] == plans
    pickle.loads(pickle.dumps(one))


def inference_tensors(layout: Layout) -> None:
    run, first, second = fixture(layout)
    with torch.inference_mode():
        pack = pack_of(torch.tensor(FIRST, dtype=torch.int32))
        assert pack.cu_seqlens_q.is_inference()
        assert torch.equal(run(pack), first)
        pack.cu_seqlens_q.copy_(torch.tensor(SECOND))
        assert torch.equal(run(pack), second)


def one_row_of_bounds(layout: Layout) -> None:
    run, first, _ = fixture(layout)
    assert torch.equal(run(pack_of([FIRST])), first)
    assert torch.equal(run(pack_of(torch.tensor(FIRST, dtype=torch.int64))), first)
    assert torch.equal(run(pack_of([0, 64, 64, 256, 256, 256])), first), "empty documents change nothing"


REFUSED: dict[str, tuple[dict, str]] = {
    "no bounds": ({"cu_seqlens_q": None, "cu_seqlens_kv": None}, r"set cu_seqlens_q to their int32 bounds"),
    "floats": ({"cu_seqlens_q": torch.tensor([0.0, 64.0, 256.0])}, r"pass torch\.tensor\(\[0, \.\.\., num_tokens\]"),
    "a list": ({"cu_seqlens_q": [0, 64, 256]}, r"pass torch\.tensor\(\[0, \.\.\., num_tokens\]"),
    "two rows of bounds": ({"cu_seqlens_q": torch.tensor([FIRST, FIRST])}, "flatten_batch_for_packed_sequences"),
    "other keys": ({"cu_seqlens_kv": torch.tensor(SECOND)}, "pass the same tensor for both"),
    "other padded keys": ({"cu_seqlens_kv_padded": torch.tensor(SECOND)}, "pass the same tensor for both"),
    "longer than padded": ({"cu_seqlens_q_padded": torch.tensor(SECOND)}, "leave cu_seqlens_q_padded out"),
    "another end": ({"cu_seqlens_q": torch.tensor([0, 64, 128]), "cu_seqlens_kv": None}, "ends at 256"),
    "another start": ({"cu_seqlens_q": torch.tensor([64, 128, 256]), "cu_seqlens_kv": None}, r"pass \[0, num_tokens\]"),
    "not packed": ({"qkv_format": "sbhd"}, "set qkv_format='thd'"),
    "another group size": ({"local_cp_size": 7}, "turn hybrid_context_parallel off"),
}


def refuses(layout: Layout) -> None:
    attention = build_attention(make_config(layout))
    x = torch.zeros(256 // layout.cp, 1, HIDDEN, dtype=torch.float64)
    for changes, remedy in REFUSED.values():
        pack = pack_of(FIRST, **changes)
        expect_error(lambda pack=pack: attention(x, None, packed_seq_params=pack), remedy)
    two = torch.zeros(128 // layout.cp, 2, HIDDEN, dtype=torch.float64)
    expect_error(lambda: attention(two, None, packed_seq_params=pack_of([0, 64, 128])), "set micro_batch_size=1")


WRITES: dict[str, Callable[[Layout], None]] = {
    "replaced": follows(replaced),
    "written": follows(written),
    "an element written": follows(written_element),
    "written through .data": follows(written_behind),
    "written through numpy": follows(written_by_numpy),
    "padded bounds": follows(padded_bounds),
    "a deep copy": follows(copied_and_written),
    "a copy": follows(shallow_copied),
    "another at the same address": at_the_same_address,
    "one plan a pack": keeps_its_plan,
    "inference mode": inference_tensors,
    "one row of bounds": one_row_of_bounds,
    "what is no pack": refuses,
}


# --- over ranks --------------------------------------------------------------------------------------------------


def prepared(layout: Layout) -> None:
    """The layer asks nobody: the answer is there."""
    run, first, second = fixture(layout)
    config, asked = make_config(layout), []
    agree = Comm.agree
    Comm.agree = lambda self, value: asked.append(value) or agree(self, value)
    try:
        for bounds, expected in ((FIRST, first), (SECOND, second)):
            for claimed in (None, bounds, torch.tensor([bounds])):
                pack = pack_of(bounds)
                prepare_pack(pack, config, device=torch.device("cpu"), cu_seqlens=claimed)
                assert torch.equal(run(pack), expected)
        ahead, place = pack_of(FIRST), Place(2, parallel_state.get_context_parallel_rank(), torch.device("cpu"))
        with ThreadPoolExecutor(1) as other:
            planned = other.submit(plan_pack, ahead, config, place, FIRST).result()
        derived = set(planned.plan._cache)
        assert prepare_pack(ahead, config, device=torch.device("cpu"), planned=planned).plan is planned.plan
        assert [key[0] for key in set(planned.plan._cache) - derived] == ["asked"], "the ranks, and nothing else"
        assert torch.equal(run(ahead), first)
        assert not asked
        pack.cu_seqlens_q.copy_(torch.tensor(FIRST))
        assert torch.equal(run(pack), first), "what is written after preparing is seen"
        assert len(asked) == 1
    finally:
        Comm.agree = agree
    pack = pack_of(FIRST)
    prepare_pack(pack, config, device=torch.device("cpu"), cu_seqlens=SECOND)
    expect_error(lambda: run(pack), "pass the values of its own cu_seqlens_q")
    expect_error(lambda: prepare_pack(pack_of([0, 64, 200]), config, device=torch.device("cpu")), "pad each document")


def ranks_that_disagree(layout: Layout) -> None:
    rank = parallel_state.get_context_parallel_rank()
    attention = build_attention(make_config(layout))
    x = torch.zeros(128, 1, HIDDEN, dtype=torch.float64)
    bounds = [FIRST, SECOND][rank]
    remedy = "build the plan from the same cu_seqlens on every rank"
    expect_error(lambda: attention(x, None, packed_seq_params=pack_of(bounds)), remedy)
    pack = pack_of(bounds)
    prepare_pack(pack, make_config(layout), device=torch.device("cpu"))
    expect_error(lambda: attention(x, None, packed_seq_params=pack), remedy)
    # One rank has seen these values before, in another pack.
    attention(x, None, packed_seq_params=pack_of(FIRST))
    expect_error(lambda: attention(x, None, packed_seq_params=pack_of(bounds)), remedy)
    # A row whose tokens must travel: nobody sends before all agree.
    attention = build_attention(make_config(layout, nsa_pack_order="sequence"))
    bounds = [[0, 30, 256], [0, 40, 256]][rank]
    expect_error(lambda: attention(x, None, packed_seq_params=pack_of(bounds)), remedy)


def order_of_packs(layout: Layout) -> None:
    x = torch.zeros(128, 1, HIDDEN, dtype=torch.float64)
    megatron_lm = pack_of([0, 64, 256])
    megatron_lm.tokens_per_sample = 256  # which pretrain_gpt.py of 0.19 sets, whatever the order
    attention = build_attention(make_config(layout))
    expect_error(lambda: attention(x, None, packed_seq_params=megatron_lm), "nsa_pack_order='sequence' for")
    for changes in (INTER_DOCUMENT, {"sft": True}, {"nsa_pack_order": "documents"}, {"nsa_pack_order": "sequence"}):
        build_attention(make_config(layout, **changes))(x, None, packed_seq_params=megatron_lm)
    odd = build_attention(make_config(layout, **INTER_DOCUMENT))
    row = torch.zeros(127, 1, HIDDEN, dtype=torch.float64)
    expect_error(lambda: odd(row, None, packed_seq_params=pack_of([0, 64, 254])), "pad the row to 256 tokens")


def counted(layout: Layout) -> None:
    """Only tokens that change ranks are counted: there and back, forward and backward."""
    attention = build_attention(make_config(layout, **INTER_DOCUMENT))
    x = torch.randn(128, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    traffic = Traffic()
    with attention.core_attention.counting(traffic):
        out, _ = attention(x, None, packed_seq_params=pack_of([0, 30, 256]))
        out.sum().backward()
    given, plan = ShardPlan.zigzag([0, 256], 2, 64), ShardPlan.zigzag([0, 30, 256], 2, SIZES.slc_block_len)
    rank = parallel_state.get_context_parallel_rank()
    leave = int((plan.holder(given.positions(rank))[0] != rank).sum())
    come = int((given.holder(plan.positions(rank)[plan.positions(rank) >= 0])[0] != rank).sum())
    wide, narrow = attention.linear_qkv.weight.shape[0] * 8, 4 * 8 * 8
    assert leave > 0
    assert dealt_tokens(given, plan)[rank] == (leave, come)
    assert traffic.sent_bytes["tokens"] == leave * wide + come * narrow
    assert traffic.sent_bytes["tokens.grad"] == come * wide + leave * narrow
    formula = dealt_bytes(given, plan, wide // 8, narrow // 8, 8)[rank]
    assert {kind: traffic.sent_bytes[kind] for kind in formula} == formula


OVER_RANKS: dict[str, Callable[[Layout], None]] = {
    "prepared": prepared,
    "ranks that disagree": ranks_that_disagree,
    "which order": order_of_packs,
    "bytes": counted,
}
