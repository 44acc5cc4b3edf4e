"""The sizes that define Native Sparse Attention, checked once."""

from dataclasses import dataclass, fields


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
