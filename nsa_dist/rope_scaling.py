"""How rotary positions turn: base, share of a head, and scaling for contexts longer than a model was trained with.

Needs no torch, so that a configuration is checked without it; `nsa_dist.rope` turns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: slow pairs turn `factor` times slower, fast ones as before, those between by a share of both.

    A pair is slow if it turns less than `low_freq_factor` times over `original_length` positions, and fast if more than
    `high_freq_factor` times. ValueError for numbers that are no such thing.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}, as "
                f"what lies between is shared; Llama 3.1 has 4 and 1"
            )

    def scaled(self, frequency: "Tensor", base: float) -> "Tensor":
        turns = self.original_length * frequency / (2 * math.pi)
        share = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequency * (share + (1 - share) / self.factor)

    @property
    def concentration(self) -> float:
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071), as Megatron-core computes it: `original_length` is what the model was trained with.

    Pairs that turn more than `beta_fast` times over it stay, those below `beta_slow` turn `factor` times slower, with a
    ramp over the pairs between; `round_to_pairs` begins and ends it at whole pairs. What is turned is multiplied by
    `concentration` = m(mscale) / m(mscale_all_dim), m(s) = 0.1 * s * ln(factor) + 1. ValueError for numbers that are no
    such thing.
    """

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    round_to_pairs: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, but=("mscale", "mscale_all_dim"))

    def scaled(self, frequency: "Tensor", base: float) -> "Tensor":
        width = 2 * len(frequency)
        low, high = (self._pair_of(beta, width, base) for beta in (self.beta_fast, self.beta_slow))
        if self.round_to_pairs:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        pair = frequency.new_ones(len(frequency)).cumsum(0) - 1
        slow = ((pair - low) / (high - low)).clamp(0, 1)
        return frequency * (1 - slow + slow / self.factor)

    def _pair_of(self, turns: float, width: int, base: float) -> float:
        """Which pair, a fraction, turns so often over the original length."""
        return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    @property
    def concentration(self) -> float:
        if self.factor <= 1:
            return 1.0
        above, below = (0.1 * scale * math.log(self.factor) + 1 for scale in (self.mscale, self.mscale_all_dim))
        return above / below


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned: pair i of the turned numbers by `position / base ** (2i / turned)`, then scaled.

    percent     the share of a head that is turned, its first numbers; 0: none, which is NoPE
    stretch     positions are divided by it (linear interpolation)
    scaling     of the frequencies, for contexts longer than those a model was trained with

    ValueError for a base, percent or stretch that is none, or YaRN with another percent or stretch than 1.
    """

    base: float = 10_000.0
    percent: float = 1.0
    stretch: float = 1.0
    scaling: Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        if not (self.base > 1 and 0 <= self.percent <= 1 and self.stretch > 0):
            raise ValueError(
                f"base={self.base}, percent={self.percent} and stretch={self.stretch} must be above 1, from 0 to 1, "
                f"and positive, or they say nothing about positions; 10000, 1 and 1 are the usual ones"
            )
        if isinstance(self.scaling, YarnScaling) and (self.percent not in (0, 1) or self.stretch != 1):
            raise ValueError(
                f"percent={self.percent} and stretch={self.stretch} change what is turned, but YaRN's ramp is over the "
                f"pairs of a whole head, at their own positions; take percent=1 and stretch=1, or another scaling"
            )

    def turned(self, head_dim: int) -> int:
        """How many of a head's numbers are turned, the first ones. ValueError if they do not make pairs."""
        width = int(head_dim * self.percent)
        if width % 2:
            raise ValueError(
                f"percent={self.percent} of head_dim={head_dim} is {width} numbers, and rotary positions turn pairs of "
                f"them; take percent={(width + 1) / head_dim:g}"
            )
        return width


_KINDS: dict[str, tuple[type, dict[str, str]]] = {
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_length",
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
            "truncate": "round_to_pairs",
        },
    ),
}


def scaling_of(words: Mapping[str, Any] | None) -> tuple[float, Llama3Scaling | YarnScaling | None]:
    """What `rope_scaling` of a `config.json` by Hugging Face says: (stretch, scaling) of a `Rotary`.

    `rope_type` (or `type`) is llama3, yarn, linear (positions divided by `factor`) or default (nothing). ValueError for
    other types, for numbers that are missing or none, and for keys that mean nothing here.
    """
    given = {name: value for name, value in (words or {}).items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default" if not given else None))
    given.pop("type", None)
    fields = {"default": {}, "linear": {"factor": "stretch"}, **{name: keys for name, (_, keys) in _KINDS.items()}}
    if kind not in fields:
        raise ValueError(
            f"rope_scaling={dict(words or {})} must have rope_type {', '.join(fields)}, which are those known here; "
            f"give one of them, such as {{rope_type: llama3, factor: 8}}"
        )
    unknown = sorted(given.keys() - fields[kind].keys())
    if unknown or ("factor" in fields[kind] and "factor" not in given):
        raise ValueError(
            f"rope_scaling={dict(words or {})} must have factor and none but {', '.join(fields[kind]) or 'rope_type'}, "
            f"which is what rope_type={kind} reads; {'leave ' + ', '.join(unknown) + ' out' if unknown else 'give it'}"
        )
    wrong = [name for name, value in given.items() if isinstance(value, bool) != (name == "truncate")]
    wrong += [name for name, value in given.items() if not isinstance(value, int | float)]
    if wrong:
        raise ValueError(f"rope_scaling.{wrong[0]}={given[wrong[0]]!r} must be a number; give one, or leave it out")
    options = {fields[kind][name]: value for name, value in given.items()}
    if kind in _KINDS:
        return 1.0, _KINDS[kind][0](**options)
    return float(options.get("stretch", 1.0)), None


def _check_positive(scaling: Llama3Scaling | YarnScaling, but: tuple[str, ...] = ()) -> None:
    for name, value in vars(scaling).items():
        if name not in but and not isinstance(value, bool) and not value > 0:
            raise ValueError(
                f"{name}={value} must be positive, or frequencies would turn round or stand still; leave {name} out, "
                f"or give what the model was trained with"
            )
