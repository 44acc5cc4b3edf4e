"""FLOPs of a step for Megatron-LM's throughput lines, which count dense attention by themselves.

What changes is each layer's attention: its projections (three pairs of K and V, gates) and its branches, by the closed
sums of `nsa_dist.cp.formulas.work`. MLP, embeddings and the output stay as Megatron-LM counts them: a multiply-add is
two, the backward of a product is twice its forward, nothing that is computed again for memory's sake is counted.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.batches import call_plan
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.formulas.groups import num_head_groups
from nsa_dist.cp.formulas.work import (
    RankWork,
    backward_flops,
    cmp_keys_below,
    forward_flops,
    slc_keys_below,
    win_keys_below,
)
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.mcore.cpu import replaced
from nsa_dist.mcore.megatron_lm.arguments import fetch_from_args, sizes_from_args


@contextmanager
def counting_nsa(training: Any) -> Iterator[None]:
    """Inside, `training` (the module megatron.training.training) counts and reports NSA layers."""
    count = flops_counter(training.num_floating_point_operations)
    with ExitStack() as stack:
        stack.enter_context(replaced(training, "num_floating_point_operations", count))
        stack.enter_context(replaced(training, "report_theoretical_memory", _say_no_memory))
        yield


def flops_counter(dense: Callable[..., float]) -> Callable[..., float]:
    """Megatron-LM's `num_floating_point_operations` as `dense`, with NSA's attention in place of dense attention.

    Of a batch of packs Megatron-LM (core 0.19) hands over sums alone: tokens, and their documents' lengths squared. It
    is counted as documents of one length that have these sums.
    """

    def count(
        args: Namespace,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        packs = (seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
        total = dense(args, batch_size, *(packs if any(p is not None for p in packs) else ()))
        squares, tokens = packs
        tokens = batch_size * args.seq_length if tokens is None else float(tokens)
        squares = tokens * args.seq_length if squares is None else float(squares)
        if not tokens:
            return total
        layers = attention_layers(args)
        length = max(1, round(squares / tokens))
        attention = nsa_attention_flops(args, length) * tokens / length
        return total + layers * (attention - dense_attention_flops(args, tokens, squares))

    return count


def attention_layers(args: Namespace) -> int:
    """Those of multi-token prediction too, as Megatron-LM counts them."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    return args.num_layers + (args.mtp_num_layers or 0) if pattern is None else pattern.count("*")


def dense_attention_flops(args: Namespace, tokens: float, squares: float) -> float:
    """Of one layer, as Megatron-LM counts it: projections, and half of all pairs. Forward and backward."""
    q = args.kv_channels * args.num_attention_heads
    kv = args.kv_channels * _groups(args)
    return 6 * (tokens * args.hidden_size * (2 * q + 2 * kv) + squares * q)


def nsa_attention_flops(args: Namespace, length: int) -> float:
    """Of one layer and one document of `length` tokens. Forward and backward."""
    cfg, heads, v_dim = sizes_from_args(args), args.num_attention_heads, args.nsa_v_head_dim or args.kv_channels
    pairs = 1 if args.nsa_shared_kv else 3
    rows = heads * (args.kv_channels + 3) + _groups(args) * pairs * (args.kv_channels + v_dim)
    projections = 6 * length * args.hidden_size * (rows + heads * v_dim)
    sizes = HeadSizes(heads, _groups(args), args.kv_channels, v_dim)
    phi = (args.kv_channels, v_dim) if args.nsa_compression == "mlp" else ()
    work = _work(length, cfg)
    branches = (*forward_flops(work, sizes, cfg, phi).values(), *backward_flops(work, sizes, cfg, phi).values())
    return projections + sum(branches)


def _work(length: int, cfg: NSAConfig) -> RankWork:
    return RankWork(
        cmp_keys=cmp_keys_below(length, cfg),
        slc_keys=slc_keys_below(length, cfg),
        win_keys=win_keys_below(length, cfg),
        own_cmp_blocks=cfg.num_cmp_blocks(length),
    )


def _groups(args: Namespace) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def local_head_groups(args: Namespace) -> int:
    """Groups in which the kv heads of a rank travel, of samples of one document; calls in line take one."""
    size, width = args.tensor_model_parallel_size, args.kv_channels
    heads = HeadSizes(
        max(1, args.num_attention_heads // size), max(1, _groups(args) // size), width, args.nsa_v_head_dim or width,
        2 if args.bf16 or args.fp16 else 4,
    )  # fmt: skip
    cfg, fetch = sizes_from_args(args), fetch_from_args(args)
    plan = ShardPlan.zigzag([0, args.seq_length], args.context_parallel_size, cfg.slc_block_len)
    plan = call_plan(plan, args.micro_batch_size, heads.num_q_heads * width)
    return num_head_groups(plan, cfg, heads, fetch)


def _say_no_memory(args: Namespace, num_microbatches: int | None = None, verbose: bool = False) -> None:
    if args.context_parallel_size > 1:
        why = "by sizes, one in calls in line" if args.nsa_head_groups is None else "--nsa-head-groups"
        print(f"NSA: kv heads travel between ranks in {local_head_groups(args)} groups ({why})", flush=True)
    print(
        "Theoretical memory footprints: left out, as Megatron-LM's formulas are those of dense attention; what the GPU "
        "holds is in the next line, and `nsa-dist plan` estimates NSA layers",
        flush=True,
    )
