"""Rotary positions against their formulas, one number at a time, and how a configuration words their scaling."""

import math

import pytest
import torch

from nsa_dist.rope import rotate
from nsa_dist.rope_scaling import Llama3Scaling, Rotary, YarnScaling, scaling_of

HEAD = 128
FAR = [0, 1, 77, 8_191, 131_071, 1_000_003]


def expected(x: torch.Tensor, position: int, frequency: list[float], factor: float = 1.0) -> list[float]:
    """One head, in Python's own numbers."""
    half, out = len(frequency), x.tolist()
    for i, theta in enumerate(frequency):
        cos, sin = math.cos(position * theta), math.sin(position * theta)
        a, b = float(x[i]), float(x[i + half])
        out[i], out[i + half] = factor * (a * cos - b * sin), factor * (b * cos + a * sin)
    return out


def plain(base: float, width: int) -> list[float]:
    return [base ** (-2 * i / width) for i in range(width // 2)]


def llama3(base: float, factor: float, low: float, high: float, length: int) -> list[float]:
    """By wavelengths, as Llama 3.1 was published."""
    out = []
    for theta in plain(base, HEAD):
        wavelength = 2 * math.pi / theta
        if wavelength < length / high:
            out.append(theta)
        elif wavelength > length / low:
            out.append(theta / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            out.append((1 - smooth) * theta / factor + smooth * theta)
    return out


def yarn(base: float, factor: float, length: int) -> list[float]:
    """NTK by parts: pairs that turn 32 times over the length stay, those that turn once are interpolated."""
    first, last = (HEAD * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (32, 1))
    first, last = math.floor(first), math.ceil(last)
    ramp = [min(max((i - first) / (last - first), 0), 1) for i in range(HEAD // 2)]
    return [theta / factor * r + theta * (1 - r) for theta, r in zip(plain(base, HEAD), ramp, strict=True)]


CASES = {
    "plain": (Rotary(), plain(1e4, HEAD), 1.0),
    "another base": (Rotary(5e5), plain(5e5, HEAD), 1.0),
    "a quarter of the head": (Rotary(percent=0.25), plain(1e4, 32), 1.0),
    "interpolated": (Rotary(stretch=4), [theta / 4 for theta in plain(1e4, HEAD)], 1.0),
    "Llama 3": (Rotary(5e5, scaling=Llama3Scaling()), llama3(5e5, 8, 1, 4, 8192), 1.0),
    "Llama 3, other numbers": (Rotary(scaling=Llama3Scaling(4, 2, 8, 512)), llama3(1e4, 4, 2, 8, 512), 1.0),
    "YaRN": (Rotary(scaling=YarnScaling(16)), yarn(1e4, 16, 4096), 0.1 * math.log(16) + 1),
    "YaRN without a factor": (Rotary(scaling=YarnScaling(16, mscale_all_dim=1)), yarn(1e4, 16, 4096), 1.0),
    "no positions": (Rotary(percent=0), [], 1.0),
}


@pytest.mark.parametrize(("rotary", "frequency", "factor"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_a_head_is_turned_as_the_formula_says_a_million_tokens_away_too(rotary, frequency, factor, dtype, atol):
    x = torch.randn(len(FAR), 1, HEAD, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = rotate(x, torch.tensor(FAR), rotary)
    assert found.dtype == dtype
    wanted = [expected(row[0], position, frequency, factor) for row, position in zip(x, FAR, strict=True)]
    torch.testing.assert_close(found[:, 0].double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (None, (1.0, None)),
        ({"rope_type": "default"}, (1.0, None)),
        ({"type": "linear", "factor": 4}, (4.0, None)),
        (
            {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "original_max_position_embeddings": 512},
            (1.0, Llama3Scaling(32, 1, 4, 512)),
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "truncate": False, "mscale": None},
            (1.0, YarnScaling(2.0, beta_fast=16, round_to_pairs=False)),
        ),
    ],
)
def test_the_words_of_a_configuration(words, meaning):
    assert scaling_of(words) == meaning


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ({"rope_type": "longrope", "factor": 4}, "give one of them"),
        ({"factor": 4}, "give one of them"),
        ({"rope_type": "llama3"}, "reads; give it"),
        ({"rope_type": "llama3", "factor": 8, "beta_fast": 1}, "leave beta_fast out"),
        ({"rope_type": "yarn", "factor": True}, "must be a number; give one"),
        ({"rope_type": "yarn", "factor": -1}, "factor=-1 must be positive.*leave factor out"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}, "Llama 3.1 has 4 and 1"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, remedy):
    with pytest.raises(ValueError, match=remedy):
        scaling_of(words)


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ({"base": 1.0}, "10000, 1 and 1 are the usual ones"),
        ({"percent": 1.5}, "10000, 1 and 1 are the usual ones"),
        ({"percent": 0.5, "scaling": YarnScaling(4)}, "take percent=1 and stretch=1"),
    ],
)
def test_positions_that_mean_nothing_are_refused(sizes, remedy):
    with pytest.raises(ValueError, match=remedy):
        Rotary(**sizes)


def test_a_width_that_makes_no_pairs_is_refused():
    with pytest.raises(ValueError, match=r"take percent=0.5"):
        Rotary(percent=0.4).turned(8)
