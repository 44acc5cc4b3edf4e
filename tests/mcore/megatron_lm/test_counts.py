"""FLOPs of NSA in Megatron-LM's lines: against multiply-adds counted one by one, and parameters of a layer."""

from types import SimpleNamespace

import pytest

from megatron_lm_cases import parsed
from nsa_dist.mcore.megatron_lm.counts import (
    counting_nsa,
    dense_attention_flops,
    flops_counter,
    nsa_attention_flops,
)

LENGTH = 200
SIZES = ["--nsa-cmp-block-len", "8", "--nsa-cmp-stride", "4", "--nsa-slc-block-len", "16", "--nsa-window-len", "20"]


def visible(length: int) -> tuple[int, int, int]:
    """Compressed, selected and window keys of all queries, one query after another."""
    cmp = sum(sum(first + 8 <= t + 1 for first in range(0, length - 8 + 1, 4)) for t in range(length))
    slc = sum(t + 1 if t // 16 < 4 else 3 * 16 + t % 16 + 1 for t in range(length))
    win = sum(min(t + 1, 20) for t in range(length))
    return cmp, slc, win


@pytest.mark.parametrize("shared", [False, True])
def test_one_layer_is_what_it_multiplies(shared):
    args = parsed(*SIZES, *(["--nsa-shared-kv"] if shared else []))
    hidden, heads, groups, dim = 64, 4, 2, 16
    rows = heads * dim + groups * (1 if shared else 3) * 2 * dim + heads * 3
    weights = hidden * rows + heads * dim * hidden
    cmp, slc, win = visible(LENGTH)
    forward = 2 * 2 * dim * heads * (cmp + slc + win) + 2 * dim * heads * cmp  # and the scores that select
    backward = 2 * 5 * dim * heads * (cmp + slc + win)  # scores again, dP, dV, dQ, dK
    blocks = (LENGTH - 8) // 4 + 1
    phi = 2 * groups * blocks * 2 * (8 * dim * dim + dim * dim)
    assert nsa_attention_flops(args, LENGTH) == 6 * LENGTH * weights + forward + backward + 3 * phi


def test_attention_is_put_in_the_place_of_dense_attention():
    args = parsed(*SIZES, "--mtp-num-layers", "1", "--seq-length", str(LENGTH))
    dense = dense_attention_flops(args, 3 * LENGTH, 3 * LENGTH**2)
    assert dense == 6 * 3 * (LENGTH * 64 * (2 * 64 + 2 * 32) + LENGTH**2 * 64)
    count = flops_counter(lambda args, batch_size: 1000 + 3 * dense)
    assert count(args, 3) == pytest.approx(1000 + 3 * 3 * nsa_attention_flops(args, LENGTH))


def over(size, args):
    """With what Megatron-LM's own parser adds, of so many context-parallel ranks."""
    vars(args).update(
        context_parallel_size=size, tensor_model_parallel_size=1, micro_batch_size=1, bf16=True, fp16=False
    )
    return args


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "in 1 groups (by sizes, one in calls in line)"),
        (["--nsa-head-groups", "2"], "in 2 groups (--nsa-head-groups)"),
        (["--seq-length", str(2**21)], "in 2 groups (by sizes"),
    ],
)
def test_groups_of_heads_are_told_once(given, said, capsys):
    training = SimpleNamespace(num_floating_point_operations=print, report_theoretical_memory=print)
    for size in (1, 2):
        args = over(size, parsed(*given))
        with counting_nsa(training):
            training.report_theoretical_memory(args, num_microbatches=1)
        found = capsys.readouterr().out
        assert (said in found) == (size > 1)


def test_packs_are_counted_by_their_documents():
    args = parsed(*SIZES)
    seen = []
    count = flops_counter(lambda *given: seen.append(given) or 0.0)
    documents, length = 7, 100
    packed = count(args, 1, documents * length**2, documents * length)
    assert seen == [(args, 1, documents * length**2, documents * length)]
    dense = dense_attention_flops(args, documents * length, documents * length**2)
    assert packed == pytest.approx(2 * (documents * nsa_attention_flops(args, length) - dense))
    assert count(args, 1, 0, 0) == 0


def test_megatron_lm_is_as_it_was_afterwards(capsys):
    def dense(args, batch_size):
        return 0.0

    training = SimpleNamespace(num_floating_point_operations=dense, report_theoretical_memory=print)
    with counting_nsa(training):
        assert training.num_floating_point_operations is not dense
        training.report_theoretical_memory(over(1, parsed()), num_microbatches=1, verbose=True)
    assert (training.num_floating_point_operations, training.report_theoretical_memory) == (dense, print)
    assert "formulas are those of dense attention" in capsys.readouterr().out
