"""Sums about sizes, for the host: triton's own take 1.4 us a call, 6 to 8% of a layer's host time."""


def cdiv(number: int, by: int) -> int:
    return -(-number // by)


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below `number`."""
    return cdiv(number, multiple) * multiple


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A head dim as two tile widths, a power of two and a smaller rest, which may be 0.

    Two dots of 128 and 64 columns cost less than one of 256. `limits.check_head_dim` says which rests kernels take.

    >>> split_head_dim(128), split_head_dim(192)
    ((128, 0), (128, 64))
    """
    first = 1 << (head_dim.bit_length() - 1) if head_dim else 0
    return first, head_dim - first
