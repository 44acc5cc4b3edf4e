"""Where the compressed keys and values of a cache over ranks lie: on every rank, or each on the rank of its page.

    replicated  each rank keeps and reads them all, chooses alone, and sends its part of selected attention: one
                exchange of a layer and step
    sharded     each rank keeps and reads a P-th: three exchanges, and bytes that shrink with the number of ranks

Replicated, a rank reads all N / d rows, and sharded a P-th of them, but waits for two exchanges more. At 1M tokens,
with the paper's sizes, Hkv 4, D 128 and bf16, they are 134 MB, about 35 us of an H200's memory, and a fourth of them
9 us; two all-gathers take tens of us.
"""

from typing import Literal, get_args

CmpPlacement = Literal["replicated", "sharded"]

MOST_REPLICATED_TOKENS = 2**20 + 2**16  # 1M of a context, and 64k that follow it


def placement_of(given: CmpPlacement | None, num_tokens: int) -> CmpPlacement:
    """What was asked for, or what suits a pool of `num_tokens` tokens, of all sequences and ranks together.

    ValueError for a name that is none.
    """
    if given is None:
        return "replicated" if num_tokens <= MOST_REPLICATED_TOKENS else "sharded"
    if given not in get_args(CmpPlacement):
        raise ValueError(
            f"cmp_placement={given!r} must be one of {', '.join(map(repr, get_args(CmpPlacement)))}, or None: "
            f"compressed keys lie on all ranks or each on one; leave it out, and they are replicated up to "
            f"{MOST_REPLICATED_TOKENS:,} tokens of all ranks' pages"
        )
    return given
