"""What is measured: sizes, head dims and kinds of input, named so that a run can pick among them."""

from collections.abc import Sequence
from dataclasses import dataclass

CAPTURED_TOKENS = 16384  # up to here the host's time shows, so the layer is timed as CUDA graphs, too


@dataclass(frozen=True)
class Case:
    """One document of `tokens` tokens through one layer, or a pack of them, bf16."""

    tokens: int
    num_q_heads: int
    num_kv_heads: int
    dim_k: int = 128
    dim_v: int = 128
    correlated: bool = False  # neighbouring tokens alike, as in a trained model; else independent normal numbers
    documents: tuple[int, ...] = ()  # their lengths; none: one document

    @property
    def name(self) -> str:
        kind = "correlated" if self.correlated else "random"
        heads = f"Hq{self.num_q_heads}/Hkv{self.num_kv_heads}"
        pack = f" {pack_name(self.documents)}" if self.documents else ""
        return f"{self.tokens // 1024}k{pack} {heads} {self.dim_k}/{self.dim_v} {kind}"

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        return self.dim_k**-0.5


def pack_name(documents: Sequence[int]) -> str:
    """`16x4k`, `17 ragged`."""
    count = len(documents)
    return f"{count}x{documents[0] // 1024}k" if len(set(documents)) == 1 else f"{count} ragged"


K = 1024
# The four sizes with a bar: G of 16, 4 and 1 at 64k tokens, and a short sequence, where launches weigh.
TARGETS = [Case(64 * K, 64, 4), Case(64 * K, 32, 8), Case(64 * K, 16, 16), Case(8 * K, 64, 4)]
KINDS = [
    Case(64 * K, 64, 4, correlated=True),
    Case(64 * K, 16, 16, correlated=True),
    Case(64 * K, 64, 4, 192, 128),
    Case(64 * K, 32, 8, 192, 128),
]
LENGTHS = [
    Case(16 * K, 64, 4),
    Case(32 * K, 64, 4),
    Case(128 * K, 64, 4),
    Case(256 * K, 64, 4),
    Case(512 * K, 16, 1),
    Case(1024 * K, 16, 1),
]
# What models have, so that whatever falls off a cliff is seen: every kind of group, then head dims.
HEADS = [
    (16, 16), (16, 8), (24, 8), (32, 8), (40, 8), (24, 4), (28, 4), (64, 8),
    (16, 2), (48, 4), (64, 4), (48, 2), (64, 2), (48, 1), (64, 1),
]  # fmt: skip
GROUPS = [Case(16 * K, *heads) for heads in HEADS]
DIMS = [Case(16 * K, 64, 4, *dims) for dims in [(64, 64), (80, 64), (96, 64), (128, 64), (192, 128), (256, 256)]]
RAGGED = 20000, 12345, 9001, 7000, 5200, 3300, 2600, 1900, 1400, 900, 700, 500, 300, 200, 100, 50, 40
PACKS = [Case(64 * K, 64, 4, documents=documents) for documents in [(16 * K,) * 4, (4 * K,) * 16, (K,) * 64, RAGGED]]
PRESETS = {
    "smoke": [Case(1 * K, 4, 2, 64, 64)],
    "table": [*TARGETS, Case(256 * K, 64, 4), Case(1024 * K, 16, 1)],
    "targets": TARGETS,
    "kinds": KINDS,
    "lengths": LENGTHS,
    "groups": GROUPS,
    "dims": DIMS,
    "packs": PACKS,
    "full": [*TARGETS, *KINDS, *LENGTHS],
}
