"""The sizes of a whole bench: long sequences on GPUs, tiny ones with the same structure on CPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nsa_dist.bench.case import HEAD_GROUPS, Case, ways
from nsa_dist.config import NSAConfig
from nsa_dist.cp.formulas.cost import HeadSizes


@dataclass(frozen=True)
class Sizes:
    """What is measured on one kind of device."""

    tokens: tuple[int, ...]  # whole sequences, the most telling first
    heads: tuple[HeadSizes, ...]
    cfg: NSAConfig
    tokens_per_rank: tuple[int, ...]  # of what grows with the ranks: scaling (the last), memory (all)
    checked_tokens: int  # of the comparison with one rank
    page_budget_bytes: int  # of the memory curve
    head_groups: tuple[int | None, ...] = (HEAD_GROUPS,)  # of what is timed
    everyday_per_rank: tuple[int, ...] = (2**11, 2**12, 2**13, 2**14, 2**15, 2**17)  # tokens
    everyday_heads: tuple[HeadSizes, ...] = (HeadSizes(64, 4, 128, 128), HeadSizes(16, 4, 128, 128))

    def case(self, tokens: int, cp_size: int, **changes) -> Case:
        return replace(Case(tokens, cp_size, heads=self.heads[0], cfg=self.cfg), **changes)

    def timed(self, cp_size: int) -> Iterator[Case]:
        """Every way of every length and head size, the most telling first."""
        for heads in self.heads:
            for tokens in self.tokens:
                yield from ways(self.case(tokens, cp_size, heads=heads), head_groups=self.head_groups)

    def memory_curve(self, cp_sizes: tuple[int, ...] = (1, 2, 4, 8)) -> Iterator[Case]:
        """As many tokens a rank while the ranks grow: fetched within a budget, and gathered."""
        for per_rank in self.tokens_per_rank:
            for cp_size in cp_sizes:
                case = self.case(per_rank * cp_size, cp_size, page_budget_bytes=self.page_budget_bytes)
                yield case
                if cp_size > 1:
                    yield replace(case, mode="all-gather", page_budget_bytes=None)

    def everyday(self, cp_size: int, transports: tuple[str, ...]) -> Iterator[tuple[Case, ...]]:
        """Every length and head size in all ways, everybody choosing everything."""
        for heads in self.everyday_heads:
            for per_rank in self.everyday_per_rank:
                case = self.case(per_rank * cp_size, cp_size, heads=heads, union_fraction=1.0, head_groups=None)
                fetched = tuple(replace(case, transport=transport) for transport in transports)
                yield (*fetched, replace(case, mode="all-gather"), replace(case, mode="shared all-gather"))

    def scaling(self, cp_sizes: list[int]) -> Iterator[Case]:
        for cp_size in cp_sizes:
            yield self.case(self.tokens_per_rank[-1] * cp_size, cp_size)


LARGE = Sizes(
    tokens=(2**20, 2**19, 2**17),
    heads=(HeadSizes(64, 4, 128, 128), HeadSizes(64, 4, 192, 128)),
    cfg=NSAConfig(),
    tokens_per_rank=(2**15, 2**17),
    checked_tokens=2**15,
    page_budget_bytes=2**28,
)
TINY = Sizes(
    tokens=(2048, 1024),
    heads=(HeadSizes(4, 2, 16, 16, element_bytes=4),),
    cfg=NSAConfig(num_slc_blocks=4, window_len=128),
    tokens_per_rank=(512, 1024),
    checked_tokens=1024,
    page_budget_bytes=2**16,
    everyday_per_rank=(256,),
    everyday_heads=(HeadSizes(4, 2, 16, 16, element_bytes=4),),
)


def sizes_for(device_type: str) -> Sizes:
    return LARGE if device_type == "cuda" else TINY
