"""How the selected branch may move blocks between ranks, checked once. Without torch: configurations hold it."""

from dataclasses import dataclass

# How fast an H200 packs what it sends, 32 KiB of K or V at a time: page by page, and shards as they lie
# (docs/decisions/fetch.md).
GATHER_BYTES_PER_S, COPY_BYTES_PER_S = 331e9, 980e9


# Elements of a call's queries up to which it waits for its host: at 16k tokens of 64 heads of 128 an H200 takes twice
# as long as its host (docs/decisions/host-time.md). So far launches are repeated, and exchanges run in line.
MOST_IN_LINE = 2**27

# Gradients of others' pages that lie in a mailbox at once.
CHUNK_BYTES = 2**27

TRANSPORTS = ("auto", "one_sided", "all_to_all")


@dataclass(frozen=True)
class FetchOptions:
    """How the remote blocks of the selected branch are moved. Every rank of a group must use the same.

    Raises ValueError on a budget or a number of groups below 1 or a fraction outside of (0, 1].
    """

    kv_fetch_budget_bytes: int | None = None  # pages held at once on a rank; None: those of two head groups
    whole_shard_fraction: float = 1.0  # of an (owner, kv head)'s blocks chosen: from here on all of them are sent
    keep_pages: bool = False  # keep fetched pages for backward instead of fetching them again
    transport: str = "auto"  # one of TRANSPORTS: how pages and all else move; auto: one-sided where ranks can
    head_groups: int | None = None  # kv heads travel in so many groups; None: by sizes, `formulas.groups`
    domain_size: int | None = None  # so many consecutive ranks are near; a page enters each domain once; None: off
    link_gb_per_s: float | None = None  # that a rank sends, by which groups are chosen; None: as measured among H200s

    def __post_init__(self) -> None:
        if self.kv_fetch_budget_bytes is not None and self.kv_fetch_budget_bytes < 1:
            raise ValueError(
                f"kv_fetch_budget_bytes={self.kv_fetch_budget_bytes} must be positive: a round moves at least one "
                f"page; pass None for no bound"
            )
        if not 0 < self.whole_shard_fraction <= 1:
            raise ValueError(
                f"whole_shard_fraction={self.whole_shard_fraction} is a fraction of an owner's blocks and must lie in "
                f"(0, 1]; 1 sends only what was chosen"
            )
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"transport={self.transport!r} must be one of {', '.join(TRANSPORTS)}: ranks read each other's memory, "
                f"or send by collectives; pass 'auto' to read where that can be"
            )
        if self.head_groups is not None and self.head_groups < 1:
            raise ValueError(
                f"head_groups={self.head_groups} must be at least 1: the kv heads travel in so many groups; pass 1 to "
                f"move all of them at once, with nothing to hide it"
            )
        if self.link_gb_per_s is not None and not self.link_gb_per_s > 0:
            raise ValueError(
                f"link_gb_per_s={self.link_gb_per_s:g} must be positive, because the time of sending is compared; pass "
                f"what one rank sends in a second in GB, `nsa-dist bench cp --gpus all` measures it, or None"
            )
        self._check_domains()

    def _check_domains(self) -> None:
        if self.domain_size is not None and self.domain_size < 1:
            raise ValueError(
                f"domain_size={self.domain_size} must be at least 1, because ranks form domains of so many neighbours; "
                f"pass the ranks that share a node, or None"
            )
        if (self.domain_size or 1) == 1:
            return
        if self.transport == "one_sided":
            raise ValueError(
                f"domain_size={self.domain_size} needs transport 'auto' or 'all_to_all', but 'one_sided' was given: "
                f"ranks that read each other's memory read every page where it lies; leave one of them out"
            )
        if self.whole_shard_fraction < 1:
            raise ValueError(
                f"domain_size={self.domain_size} needs whole_shard_fraction=1, but {self.whole_shard_fraction:g} was "
                f"given (link_gb_per_s sets it, too): the ranks of a domain share what enters it page by page; leave "
                f"one of them out"
            )

    @classmethod
    def for_link(
        cls,
        link_bytes_per_s: float,
        gather_bytes_per_s: float = GATHER_BYTES_PER_S,
        copy_bytes_per_s: float = COPY_BYTES_PER_S,
        **others,
    ) -> "FetchOptions":
        """Options whose threshold between fetch and whole shard is where both take the same time.

        A byte that was chosen is gathered page by page, 1 / gather, and sent, 1 / link; a byte of a whole shard is
        copied as it lies, 1 / copy, and sent. So a shard of which the fraction u was chosen is better sent whole from

            u = (1 / link + 1 / copy) / (1 / link + 1 / gather)

        on: 1 where gathering is no slower than copying or where the link is all that counts. link: what one rank sends
        in a second, to be measured or looked up; the others are an H200's. `others` are further fields of the options.
        """
        rates = {"link": link_bytes_per_s, "gather": gather_bytes_per_s, "copy": copy_bytes_per_s}
        if min(rates.values()) <= 0:
            raise ValueError(
                f"rates of {rates} bytes per second must be positive, because times are compared; pass measured ones"
            )
        threshold = (1 / link_bytes_per_s + 1 / copy_bytes_per_s) / (1 / link_bytes_per_s + 1 / gather_bytes_per_s)
        return cls(whole_shard_fraction=min(1.0, threshold), link_gb_per_s=link_bytes_per_s / 1e9, **others)

    def domain_of(self, num_ranks: int) -> int:
        """Ranks of a domain in a group of so many; 1: every rank for itself, as in one domain of all.

        ValueError unless domains divide the group.
        """
        size = self.domain_size or 1
        if num_ranks % size:
            divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
            raise ValueError(
                f"domain_size={size} must divide the {num_ranks} context-parallel ranks, because every rank belongs to "
                f"one domain of as many neighbours as the others; take one of {divisors}, or leave it out"
            )
        return 1 if size == num_ranks else size

    def round_pages(self, page_bytes: int, domain_size: int = 1) -> int | None:
        """Pages of one round: half the budget, for the next round travels while this one is in use; None: no bound.

        In domains it holds a rank's share of a round beside them, the pages that it passes on, one in `domain_size`.
        """
        if self.kv_fetch_budget_bytes is None:
            return None
        pages = self.kv_fetch_budget_bytes // page_bytes // 2
        return max(1, pages if domain_size == 1 else pages * domain_size // (domain_size + 1))

    def halves_queries(self, num_kv_heads: int) -> bool:
        """Whether the queries of a rank's only kv head go in two halves, so that one's fetch hides under the other.

        Both halves' pages are held until the end, so not under a budget; pages that are kept are not cut in two. Nor in
        domains, where what one rank chose first and another later would enter twice.
        """
        bounded = self.kv_fetch_budget_bytes is not None or self.keep_pages or (self.domain_size or 1) > 1
        return num_kv_heads == 1 and self.head_groups != 1 and not bounded

    def fetches_ahead(self, page_bytes: int, domain_size: int = 1) -> bool:
        """Whether two rounds fit in the budget. If not, each is fetched only when the one before is done with."""
        least = 2 if domain_size == 1 else 4  # of a page in use and, in domains, one that is passed on
        return self.kv_fetch_budget_bytes is None or self.kv_fetch_budget_bytes >= least * page_bytes
