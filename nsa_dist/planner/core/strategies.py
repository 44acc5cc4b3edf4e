"""The ways in which a rank can come by the remote keys and values that its queries selected: bytes, memory, messages.

All but two gather the compressed keys and exchange halos as `nsa_dist.cp` does, and all fetch again in backward
unless pages are kept; they differ in how K/V of the selected branch travels. In the other two raw K/V go to every rank,
which compresses all of it:

    raw all-gather      three K/V pairs, one a branch, gathered naively: a branch at a time, all heads of it
    shared all-gather   one K/V pair for all branches, gathered one kv head at a time into one buffer: another model,
                        with `nsa.shared_kv=true`, and a third of the bytes
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from nsa_dist.cp.formulas import cost
from nsa_dist.cp.formulas.domains import DomainPages, domain_pages_at
from nsa_dist.cp.formulas.groups import num_head_groups
from nsa_dist.cp.options import FetchOptions
from nsa_dist.planner.core.sizes import Core

How = Literal["fetch", "whole shard", "all-gather", "ring", "raw all-gather", "shared all-gather"]
COMPRESS_EVERYTHING: tuple[How, ...] = ("raw all-gather", "shared all-gather")
GATHERED: tuple[How, ...] = ("all-gather", *COMPRESS_EVERYTHING)
_OTHERS: tuple[How, ...] = ("whole shard", "all-gather", "ring", *COMPRESS_EVERYTHING)
BRANCHES = 3  # each with keys and values of its own
GIB = 2**30


@dataclass(frozen=True)
class Strategy:
    """`union_fraction` is u, the chosen remote blocks over all remote blocks of a rank and head; fetch alone has it."""

    how: How
    union_fraction: float | None = None

    @property
    def name(self) -> str:
        return self.how if self.union_fraction is None else f"fetch u={self.union_fraction:g}"


@dataclass(frozen=True)
class Options:
    """What a plan assumes beyond the configuration.

    union_fractions     the u to show; the first is the one that memory and the verdict are judged by
    fetch               the page budget, and whether pages are kept for backward or fetched again
    overlap             share of the wire time hidden under compute, for every strategy alike
    """

    union_fractions: tuple[float, ...] = (1.0, 0.2, 0.05)
    fetch: FetchOptions = field(default_factory=FetchOptions)
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not self.union_fractions or not all(0 <= u <= 1 for u in self.union_fractions):
            raise ValueError(
                f"union fractions {self.union_fractions} must be one or more numbers from 0 to 1, as each is the share "
                f"of the remote blocks that some query chose; pass for example --u 1,0.2,0.05"
            )
        if not 0 <= self.overlap <= 1:
            raise ValueError(
                f"overlap={self.overlap} must lie between 0 (nothing hidden) and 1 (all of it), because it is the "
                f"share of the wire time that hides under compute; pass 0 for what is certain"
            )

    def strategies(self) -> list[Strategy]:
        """Every row of the comparison, the judged one first."""
        fetches = [Strategy("fetch", u) for u in self.union_fractions]
        return [*fetches, *(Strategy(how) for how in _OTHERS)]


def page_bytes(core: Core, element_bytes: int) -> int:
    """One block of one key/value head, K and V."""
    return core.plan.block_len * (core.heads.dim_k + core.heads.dim_v) * element_bytes


def page_counts(core: Core, strategy: Strategy) -> cost.Matrix:
    """counts[r][q]: pages that rank r receives from rank q in one forward. All of a shard unless it is fetched."""
    if strategy.union_fraction is not None:
        u = strategy.union_fraction
        return core.plan.memo(("pages at", core.heads, u), lambda: cost.pages_at(core.plan, core.heads, u))
    size = core.plan.cp_size
    shard = core.plan.tokens_per_rank // core.plan.block_len * core.heads.num_kv_heads
    return [[shard * (source != rank) for source in range(size)] for rank in range(size)]


def domain_size(core: Core, options: Options) -> int:
    """Ranks of a domain (`FetchOptions.domain_size`); 1 for a group that it does not divide: a plan has many."""
    size = options.fetch.domain_size or 1
    return 1 if core.plan.cp_size % size else options.fetch.domain_of(core.plan.cp_size)


def domain_pages(core: Core, strategy: Strategy, options: Options) -> DomainPages | None:
    """What enters domains, and is passed on in them, where there are some and pages are fetched."""
    size = domain_size(core, options)
    if size == 1 or strategy.union_fraction is None:
        return None
    key = ("domain pages", core.heads, strategy.union_fraction, size)
    return core.plan.memo(key, lambda: domain_pages_at(core.plan, core.heads, strategy.union_fraction, size))


def sent_bytes(core: Core, strategy: Strategy, options: Options) -> dict[str, int]:
    """What the busiest rank of each kind sends, forward and backward of one layer and sequence, nothing recomputed."""
    in_domains = domain_pages(core, strategy, options)
    ranks = cost.sent_bytes(
        core.plan,
        core.cfg,
        core.heads,
        in_domains.between if in_domains else page_counts(core, strategy),
        refetch=trips(strategy, options) == 2,
        halves=options.fetch.halves_queries(core.heads.num_kv_heads),
        inside=in_domains.inside if in_domains else None,
    )
    most = {kind: max(sent[kind] for sent in ranks) for kind in ranks[0]}
    if strategy.how in COMPRESS_EVERYTHING:
        pairs = BRANCHES if strategy.how == "raw all-gather" else 1
        return dict.fromkeys(most, 0) | {kind: pairs * most[kind] for kind in most if kind.startswith("pages")}
    return most if strategy.how == "fetch" else {**most, "bitmap": 0}  # where everything goes, nobody has to say what


def trips(strategy: Strategy, options: Options) -> int:
    """How often pages travel in one forward and backward: once more in backward unless they were kept."""
    return 1 if strategy.how == "fetch" and options.fetch.keep_pages else 2


def head_groups(core: Core, options: Options) -> int:
    """In how many groups the kv heads are worked on, as `nsa_dist.cp.call` cuts them: one without other ranks."""
    fetch = replace(options.fetch, domain_size=domain_size(core, options))
    return num_head_groups(core.plan, core.cfg, core.heads, fetch)


def num_gathers(core: Core, strategy: Strategy) -> int:
    """Collectives of one trip where everything is gathered: K and V of each kv head apart, or all heads together."""
    return 2 * core.heads.num_kv_heads if strategy.how == "shared all-gather" else 1


def num_rounds(core: Core, strategy: Strategy, options: Options) -> int:
    """Partial results of selected attention, for each head, that are merged: rounds of the budget, steps of a ring."""
    if core.plan.cp_size == 1 or strategy.how in GATHERED:
        return 1
    if strategy.how == "ring":
        return core.plan.cp_size
    in_domains = domain_pages(core, strategy, options)
    if in_domains is None:
        return -(-_group_pages(core, strategy, options) // pages_at_once(core, strategy, options))
    most = _round_pages(core, options)
    return 1 if most is None else max(1, -(-max(in_domains.listed) // head_groups(core, options) // most))


def pages_at_once(core: Core, strategy: Strategy, options: Options) -> int:
    """Pages of one round on the rank that gets most, at least one: a head group's, or what half the budget holds."""
    of_group, most = _group_pages(core, strategy, options), _round_pages(core, options)
    return of_group if most is None else min(of_group, most)


def shared_at_once(core: Core, strategy: Strategy, options: Options) -> int:
    """Pages of one round that a rank fetches for its domain; none where every rank fetches for itself."""
    in_domains, most = domain_pages(core, strategy, options), _round_pages(core, options)
    if in_domains is None:
        return 0
    of_group = -(-max(map(sum, in_domains.between)) // head_groups(core, options))
    return of_group if most is None else min(of_group, -(-most // domain_size(core, options)))


def _round_pages(core: Core, options: Options) -> int | None:
    return options.fetch.round_pages(page_bytes(core, core.heads.element_bytes), domain_size(core, options))


def held_bytes(core: Core, strategy: Strategy, options: Options, *, forward: bool = False) -> int:
    """Remote K/V held at once on a rank, one layer; in backward with their gradients.

    fetch, whole shard  three rounds' pages: in use, on their way, packed for others, who fetch as much. In backward
                        gradients as written, put together, and on their way home from the round before. In domains
                        a rank's share likewise
    all-gather      the whole sequence, one key/value head at a time
    ring            two shards and the gradients that travel with them
    raw all-gather  the whole sequence of one branch, all heads, and its gradients
    shared all-gather   as all-gather: the buffer of one head, and the sums of its gradients
    """
    if core.plan.cp_size == 1:
        return 0
    heads = core.heads
    both = heads.element_bytes + (0 if forward else heads.grad_bytes)
    shard = core.tokens * heads.row_elements
    if strategy.how == "ring":
        return 2 * shard * both
    if strategy.how == "raw all-gather":
        return core.plan.cp_size * shard * both
    if strategy.how in ("all-gather", "shared all-gather"):
        return core.plan.cp_size * shard // heads.num_kv_heads * both
    at_once = pages_at_once(core, strategy, options) + shared_at_once(core, strategy, options)
    return 3 * at_once * page_bytes(core, both)


def _group_pages(core: Core, strategy: Strategy, options: Options) -> int:
    most = max(map(sum, page_counts(core, strategy)))
    return max(1, -(-most // head_groups(core, options)))
