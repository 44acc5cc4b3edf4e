"""Samples of a micro-batch as the documents of a pack: how many go through attention together, and their plan."""

from nsa_dist.cp.plan import ShardPlan

MOST_TOGETHER = 2**27  # numbers of the queries of one call: beyond it the host's share of a call no longer counts


def samples_a_call(sequence: ShardPlan, samples: int, query_width: int) -> int:
    """How many samples of a micro-batch `nsa_attention` is given at once.

    As many as divide `samples` and keep to `MOST_TOGETHER`: a call costs the host milliseconds, whatever its length,
    but its largest moment takes memory for each token.

    query_width     numbers in the query of one token on one rank
    """
    queries = sequence.tokens_per_rank * query_width
    fitting = (n for n in range(1, samples + 1) if samples % n == 0 and n * queries <= MOST_TOGETHER)
    return max(fitting, default=1)


def call_plan(sequence: ShardPlan, samples: int, query_width: int) -> ShardPlan:
    """The plan of the samples of one such call: its documents."""
    return batch_plan(sequence, samples_a_call(sequence, samples, query_width))


def batch_plan(sequence: ShardPlan, samples: int) -> ShardPlan:
    """The plan of `samples` sequences one behind the other, each cut over the ranks as `sequence` cuts one."""
    if samples == 1:
        return sequence
    assert sequence.num_documents == 1
    make = ShardPlan.zigzag_documents if sequence.layout == "zigzag" else ShardPlan.contiguous_documents
    bounds = range(0, (samples + 1) * sequence.num_tokens, sequence.num_tokens)
    return make(bounds, sequence.cp_size, sequence.block_len)
