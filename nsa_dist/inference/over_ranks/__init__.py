"""A cache over context-parallel ranks: page i of a sequence lies on rank (home + i) % P, whatever put it there.

    page        l' tokens of k_slc, v_slc, and the compressed keys and values whose last token is one of them: on a rank
    rings       on every rank: the window, and what phi still needs

New tokens attend to what each rank holds, and partial results are merged in the order of the ranks, alike on all. Where
compressed rows are replicated (`pool`), those of all pages lie on every rank, and

    compressed attention, importance, the n blocks: on every rank, as on one alone
    selected attention to those here --(out, softmax_lse) to all--> out; each has the window

Where they are sharded, they lie with their page:

    following   of the pages after it the first l/d - 1 compressed keys once more, on the rank of the page before: eq. 9
                crosses block boundaries, and so each rank finds the whole importance of its own blocks

    compressed attention --softmax_lse to all--> importance of own blocks --n candidates to all--> the n blocks
    selected attention to those here --(out, softmax_lse) of both branches to all--> out; each has the window

The first chunk of a sequence goes through training's forward over ranks instead, and its rows move to their places.
"""

from nsa_dist.inference.over_ranks.append import append
from nsa_dist.inference.over_ranks.decode import decode, decode_step, has_kernels
from nsa_dist.inference.over_ranks.prefill import first_chunks, gathered, own_rows
from nsa_dist.inference.over_ranks.storage import RankStorage, refuse_part

__all__ = [
    "RankStorage",
    "append",
    "decode",
    "decode_step",
    "first_chunks",
    "gathered",
    "has_kernels",
    "own_rows",
    "refuse_part",
]
