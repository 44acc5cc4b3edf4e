"""The sizes that define Native Sparse Attention, checked once, and which layers of a model have it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

ATTENTIONS = ("nsa", "dense")


@dataclass(frozen=True)
class NSAConfig:
    """Hyper-parameters of Native Sparse Attention, in tokens and blocks (arXiv 2502.11089, section 4.1).

    Raises ValueError on sizes with which the equations make no sense.
    """

    cmp_block_len: int = 32  # l: tokens summarised by one compressed key
    cmp_stride: int = 16  # d: tokens between the starts of two of them
    slc_block_len: int = 64  # l': tokens of one selectable block
    num_slc_blocks: int = 16  # n: blocks a query attends to, the forced ones included
    num_init_blocks: int = 1  # forced: the first blocks of the document
    num_local_blocks: int = 2  # forced: the query's own block and those just before it
    window_len: int = 512  # w: tokens of the sliding window, the query's own included

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "num_init_blocks" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}={value!r} must be an integer of at least {least}")
        for name in ("cmp_block_len", "slc_block_len"):
            length = getattr(self, name)
            if length % self.cmp_stride:
                raise ValueError(
                    f"{name}={length} must be a multiple of cmp_stride={self.cmp_stride}, so that importance is "
                    f"counted in whole strides; take {name}={_round_up(length, self.cmp_stride)}"
                )
        forced = self.num_init_blocks + self.num_local_blocks
        if forced > self.num_slc_blocks:
            raise ValueError(
                f"num_slc_blocks={self.num_slc_blocks} counts the forced blocks, so it must be at least "
                f"num_init_blocks + num_local_blocks = {forced}; raise it to {forced} or force fewer"
            )

    def num_cmp_blocks(self, document_len: int) -> int:
        """Compressed blocks of a document: only whole blocks count."""
        return max(0, (document_len - self.cmp_block_len) // self.cmp_stride + 1)


def layer_attentions(pattern: str | Sequence[str], num_layers: int) -> tuple[str, ...]:
    """One of ATTENTIONS for every layer: `pattern` is a word for all of them, or a list that repeats until they end.

    >>> layer_attentions(["nsa", "dense"], 4)
    ('nsa', 'dense', 'nsa', 'dense')

    ValueError for other words, and for a list whose length does not divide `num_layers`.
    """
    words = [pattern] if isinstance(pattern, str) else list(pattern)
    unknown = [word for word in words if word not in ATTENTIONS]
    if unknown or not words:
        raise ValueError(
            f"attention={pattern!r} must be one of {', '.join(ATTENTIONS)}, or a list of these words, one a layer, as "
            f"those are the attentions there are; for every fourth layer dense give [nsa, nsa, nsa, dense]"
        )
    if num_layers % len(words):
        raise ValueError(
            f"attention={words} names {len(words)} layers, which do not repeat evenly in num_layers={num_layers}; "
            f"name each layer, or take num_layers={_round_up(num_layers, len(words))}"
        )
    return tuple(words * (num_layers // len(words)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
