"""What inference holds: weights, the cache of so many sequences of so many tokens, and the longest that fit a GPU.

The model lies whole on each of P GPUs, as `nsa_dist.inference` has it; its cache lies over them, page i of a sequence
on rank (home + i) % P, and compressed rows with their page or on every rank (`inference.pool`), as a cache with
`num_pages` for these sequences has it if nothing is asked for. Bytes are `over_ranks.storage.rank_bytes`, which is
`CacheShape.num_bytes` for one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch

from nsa_dist.inference.model import GPT, GPTConfig
from nsa_dist.inference.over_ranks.storage import rank_bytes
from nsa_dist.inference.pool import CmpPlacement, placement_of
from nsa_dist.inference.storage import CacheShape
from nsa_dist.planner.cluster import Cluster
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.export.names import plain_config


@dataclass(frozen=True)
class CachePlan:
    """`num_sequences` of `num_tokens` tokens each over `cp_size` GPUs; bytes are those of one GPU, the fullest."""

    model: GPTConfig
    cluster: Cluster
    num_tokens: int
    num_sequences: int
    cp_size: int

    @property
    def shape(self) -> CacheShape:
        model = self.model
        return CacheShape(model.nsa, model.num_kv_heads, model.head_dim, model.v_head_dim or model.head_dim)

    @property
    def token_bytes(self) -> float:
        """Of a token in a layer, over all GPUs: its part of a page. Rings are a sequence's, whatever its length."""
        return self._bytes(1, 0, self.cmp_placement) / self.shape.cfg.slc_block_len

    @property
    def dense_token_bytes(self) -> int:
        """Of a token in a layer of dense attention: one key and one value a head."""
        shape = self.shape
        return shape.num_kv_heads * (shape.head_dim_k + shape.head_dim_v) * self.model.torch_dtype.itemsize

    @property
    def pages(self) -> int:
        """Of a layer on the fullest rank: `num_pages` of its `NSACache`."""
        return most_pages(self._pages_of(self.num_tokens), self.num_sequences, self.cp_size)

    @property
    def ring_bytes(self) -> int:
        return self.model.num_layers * self._bytes(0, self.num_sequences, self.cmp_placement)

    @property
    def cmp_placement(self) -> CmpPlacement:
        return self._placement_for(self.num_tokens)

    @property
    def cache_bytes(self) -> int:
        return self.bytes_if(self.cmp_placement)

    def bytes_if(self, placement: CmpPlacement) -> int:
        """`cache_bytes` where compressed rows lie so."""
        return self.model.num_layers * self._bytes(self.pages, self.num_sequences, placement)

    @property
    def dense_bytes(self) -> int:
        """Of a dense cache, cut evenly."""
        tokens = self.num_sequences * -(-self.num_tokens // self.cp_size)
        return self.model.num_layers * tokens * self.dense_token_bytes

    @cached_property
    def weight_bytes(self) -> int:
        return sum(x.numel() * x.itemsize for x in GPT(self.model, "meta").parameters())

    @property
    def room_bytes(self) -> int:
        """Of a GPU, beside the weights and what is reserved; the working memory of a step is not taken off."""
        return int(self.cluster.gpu_memory_bytes.value - self.cluster.reserved_bytes.value) - self.weight_bytes

    @property
    def fits(self) -> bool:
        return self.cache_bytes <= self.room_bytes

    @property
    def longest(self) -> int:
        """Tokens, whole pages, that each of the sequences can have; 0 where not even rings have room."""
        tokens = self._longest("sharded")
        return tokens if self._placement_for(tokens) == "sharded" else self._longest("replicated")

    def _longest(self, placement: CmpPlacement) -> int:
        layers = self.model.num_layers
        pages = (self.room_bytes - self.ring_bytes) // (layers * self._bytes(1, 0, placement))
        few, many = 0, max(0, pages) * self.cp_size + 1  # most_pages(few) <= pages < most_pages(many)
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (
                (middle, many) if most_pages(middle, self.num_sequences, self.cp_size) <= pages else (few, middle)
            )
        return few * self.shape.cfg.slc_block_len

    @property
    def longest_dense(self) -> int:
        """The same of a dense cache."""
        token = self.model.num_layers * self.num_sequences * self.dense_token_bytes
        return max(0, self.room_bytes // token) * self.cp_size

    def as_data(self) -> dict[str, int | float | bool | str]:
        names = (
            "num_tokens", "num_sequences", "cp_size", "token_bytes", "dense_token_bytes", "pages", "ring_bytes",
            "cmp_placement", "cache_bytes", "dense_bytes", "weight_bytes", "room_bytes", "fits", "longest",
            "longest_dense",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        return found | {f"{x}_bytes": self.bytes_if(x) for x in get_args(CmpPlacement)}

    def _placement_for(self, num_tokens: int) -> CmpPlacement:
        pages = most_pages(self._pages_of(num_tokens), self.num_sequences, self.cp_size)
        return placement_of(None, pages * self.cp_size * self.shape.cfg.slc_block_len)

    def _bytes(self, pages: int, rings: int, placement: CmpPlacement) -> int:
        return rank_bytes(self.shape, self.cp_size, pages, rings, self.model.torch_dtype, placement)

    def _pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.shape.cfg.slc_block_len)


def cache_plans(
    config: TrainConfig, cluster: Cluster, num_tokens: int, num_sequences: int, cp_sizes: Sequence[int]
) -> list[CachePlan]:
    """One for each number of GPUs. ValueError for no tokens or sequences."""
    if num_tokens < 1 or num_sequences < 1:
        raise ValueError(
            f"--context {num_tokens} and --sequences {num_sequences} must be at least 1, as they count tokens and "
            f"sequences of a cache; give for example --context 65536 --sequences 8"
        )
    model = plain_config(config)
    return [CachePlan(model, cluster, num_tokens, num_sequences, size) for size in cp_sizes]


def most_pages(pages: int, num_sequences: int, cp_size: int) -> int:
    """Pages on the fullest of `cp_size` ranks, of sequences with `pages` each whose homes are 0, 1, 2, ...

    >>> most_pages(3, 1, 2), most_pages(3, 2, 2), most_pages(5, 3, 4)
    (2, 3, 4)
    """
    rounds, more = divmod(pages, cp_size)
    homes = torch.arange(num_sequences)
    over = [int(((rank - homes) % cp_size < more).sum()) for rank in range(min(cp_size, num_sequences + more))]
    return rounds * num_sequences + max(over)


def sentence(plans: Sequence[CachePlan]) -> str:
    """The first of the plans in words."""
    plan = plans[0]
    tokens, times = f"{plan.num_tokens:,} tokens", plan.token_bytes / plan.dense_token_bytes
    what = tokens if plan.num_sequences == 1 else f"{plan.num_sequences} sequences of {tokens}"
    if plan.cp_size > 1:
        what += f" over {plan.cp_size} GPUs, compressed rows {plan.cmp_placement}"
    layers = plan.model.num_layers
    return (
        f"Inference, {what}: {plan.token_bytes:,.0f} bytes a token and layer, {times:.5g} of a dense cache's "
        f"{plan.dense_token_bytes:,}, with keys and values for each branch; {layers * plan.token_bytes:,.0f} a token "
        f"of all {layers} layers; for each sequence {plan.ring_bytes / plan.num_sequences:,.0f} more, its rings."
    )
