"""What is measured: sizes, head dims and kinds of input, named so that a run can pick among them."""

from dataclasses import dataclass

CAPTURED_TOKENS = 16384  # up to here the host's time shows, so the layer is timed as CUDA graphs, too


@dataclass(frozen=True)
class Case:
    """One document of `tokens` tokens through one layer, bf16."""

    tokens: int
    num_q_heads: int
    num_kv_heads: int
    dim_k: int = 128
    dim_v: int = 128
    correlated: bool = False  # neighbouring tokens alike, as in a trained model; else independent normal numbers

    @property
    def name(self) -> str:
        kind = "correlated" if self.correlated else "random"
        heads = f"Hq{self.num_q_heads}/Hkv{self.num_kv_heads}"
        return f"{self.tokens // 1024}k {heads} {self.dim_k}/{self.dim_v} {kind}"

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        return self.dim_k**-0.5


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
PRESETS = {
    "smoke": [Case(1 * K, 4, 2, 64, 64)],
    "table": [*TARGETS, Case(256 * K, 64, 4), Case(1024 * K, 16, 1)],
    "targets": TARGETS,
    "kinds": KINDS,
    "lengths": LENGTHS,
    "groups": GROUPS,
    "dims": DIMS,
    "full": [*TARGETS, *KINDS, *LENGTHS],
}
