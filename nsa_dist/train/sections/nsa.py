"""The section `nsa`: sizes of the branches, and what else is said of attention."""

from typing import Literal

from pydantic import Field, model_validator

from nsa_dist.config import NSAConfig
from nsa_dist.rope_scaling import Rotary, scaling_of
from nsa_dist.train.sections.section import Section


class NSASection(Section):
    """The sizes of `NSAConfig` and the choices the layer leaves open."""

    cmp_block_len: int = Field(default=32, description="tokens that one compressed key and value stand for")
    cmp_stride: int = Field(default=16, description="tokens from one compressed block to the next")
    slc_block_len: int = Field(default=64, description="tokens of a selection block")
    num_slc_blocks: int = Field(default=16, description="blocks that a query chooses, forced ones counted")
    num_init_blocks: int = Field(default=1, description="forced: the first blocks of the document")
    num_local_blocks: int = Field(default=2, description="forced: the last blocks, the query's own counted")
    window_len: int = Field(default=512, description="last tokens that a query sees, its own counted")
    shared_kv: bool = Field(default=False, description="one K/V for the three branches instead of one each")
    compression: Literal["mlp", "mean"] = Field(
        default="mlp", description="of a block's keys, and of its values: a learned MLP, or their mean"
    )
    compress_before_rope: bool = Field(
        default=True, description="keys get their rotary positions after compression; false: before it"
    )
    rotary_base: float = Field(default=10_000.0, gt=1, description="of the frequencies of rotary positions")
    rotary_percent: float = Field(
        default=1.0, ge=0, le=1, description="share of a head that is turned by its position, its first numbers"
    )
    rope_scaling: dict[str, str | bool | int | float] | None = Field(
        default=None,
        description="of the frequencies, as a config.json of Hugging Face has it: rope_type (llama3, yarn, linear) and "
        "its numbers, such as {rope_type: llama3, factor: 8}",
    )
    no_rope_freq: int | list[int] | None = Field(
        default=None, description="every so many layers the last has no positions; or 0 or 1 (none) for each layer"
    )
    gate_bias: bool = Field(default=False, description="a bias of the gates, one number a head and branch")

    @model_validator(mode="after")
    def _check_sizes(self) -> "NSASection":
        self.sizes()
        stretch, scaling = scaling_of(self.rope_scaling)
        Rotary(self.rotary_base, self.rotary_percent, stretch, scaling)
        return self

    def sizes(self) -> NSAConfig:
        """The hyper-parameters that `nsa_attention` takes."""
        return NSAConfig(
            cmp_block_len=self.cmp_block_len,
            cmp_stride=self.cmp_stride,
            slc_block_len=self.slc_block_len,
            num_slc_blocks=self.num_slc_blocks,
            num_init_blocks=self.num_init_blocks,
            num_local_blocks=self.num_local_blocks,
            window_len=self.window_len,
        )
