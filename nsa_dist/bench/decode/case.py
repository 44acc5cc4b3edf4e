"""What is measured: B sequences of as many tokens, each with one more; and the bytes that this takes at least."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nsa_dist.config import NSAConfig
from nsa_dist.inference.storage import CacheShape

PAPER_HEADS = (64, 4, 128, 128)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class DecodeCase:
    """heads: Hq, Hkv, Dk, Dv; fp8: pages in e4m3."""

    batch: int
    tokens: int
    heads: tuple[int, int, int, int] = PAPER_HEADS
    dtype: str = "bf16"
    cfg: NSAConfig = field(default_factory=NSAConfig)
    fp8: bool = False

    @property
    def name(self) -> str:
        short = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"batch {self.batch}, {short}{', fp8' if self.fp8 else ''}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def page_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else self.torch_dtype

    @property
    def shape(self) -> CacheShape:
        return CacheShape(self.cfg, *self.heads[1:])

    @property
    def pages(self) -> int:
        """Of a sequence, with room for the steps that are timed."""
        return -(-(self.tokens + 2 * self.cfg.slc_block_len) // self.cfg.slc_block_len)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token in one branch."""
        _, num_heads, dim_k, dim_v = self.heads
        return num_heads * (dim_k + dim_v) * self.torch_dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """That dense attention reads: all keys and values."""
        return self.batch * (self.tokens + 1) * self.token_bytes

    @property
    def nsa_bytes(self) -> int:
        """That the three branches read: compressed rows, tokens of the chosen blocks, the window."""
        cfg, length = self.cfg, self.tokens + 1
        own = self.tokens % cfg.slc_block_len + 1  # tokens that are seen of the own block, which is always chosen
        blocks = min(cfg.num_slc_blocks, self.tokens // cfg.slc_block_len + 1)
        of_pages = cfg.num_cmp_blocks(length) + (blocks - 1) * cfg.slc_block_len + own
        page_bytes = self.token_bytes * self.page_dtype.itemsize // self.torch_dtype.itemsize
        return self.batch * (of_pages * page_bytes + min(cfg.window_len, length) * self.token_bytes)

    @property
    def memory_bytes(self) -> int:
        """Of the cache, and of what the kernels leave to one another."""
        num_q_heads = self.heads[0]
        between = self.batch * num_q_heads * self.pages * (self.cfg.slc_block_len // self.cfg.cmp_stride) * 8
        held = self.shape.num_bytes(self.batch * self.pages, self.batch, self.torch_dtype, self.page_dtype)
        return held + between

    def as_data(self) -> dict[str, Any]:
        return {
            "case": self.name, **asdict(self), "nsa_bytes": self.nsa_bytes, "dense_bytes": self.dense_bytes,
        }  # fmt: skip
