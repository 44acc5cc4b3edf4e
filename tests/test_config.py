import dataclasses

import pytest

from nsa_dist import NSAConfig


def test_defaults_are_the_papers():
    assert dataclasses.astuple(NSAConfig()) == (32, 16, 64, 16, 1, 2, 512)
    assert [NSAConfig().num_cmp_blocks(length) for length in (0, 31, 32, 47, 48, 64)] == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ({"cmp_stride": 0}, "cmp_stride=0 must be an integer of at least 1"),
        ({"window_len": 1.5}, "window_len=1.5 must be an integer"),
        ({"num_init_blocks": -1}, "at least 0"),
        ({"cmp_block_len": 40}, "take cmp_block_len=48"),
        ({"slc_block_len": 72}, "take slc_block_len=80"),
        ({"num_slc_blocks": 2}, "raise it to 3 or force fewer"),
    ],
)
def test_nonsense_is_refused(sizes, remedy):
    with pytest.raises(ValueError, match=remedy):
        NSAConfig(**sizes)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().window_len = 3
