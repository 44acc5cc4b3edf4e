"""How a model and its sequences are cut over processes."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nsa_dist.cp.options import FetchOptions
from nsa_dist.train.sections.section import Section


class ParallelSection(Section):
    """How many ways the model and the sequence are cut; what is left of the processes is data parallel."""

    tensor_model_parallel_size: int = Field(default=1, ge=1, description="ranks that share heads and MLP of a layer")
    pipeline_model_parallel_size: int = Field(default=1, ge=1, description="stages that the layers are cut into")
    context_parallel_size: int = Field(default=1, ge=1, description="ranks that share the tokens of a sequence")
    sequence_parallel: bool = Field(
        default=False, description="tensor-parallel ranks share the tokens between attention and MLP, too"
    )
    expert_model_parallel_size: int = Field(
        default=1, ge=1, description="ranks that share the experts of a layer; 1 alone is done: each rank has them all"
    )
    layout: Literal["zigzag", "contiguous"] = Field(
        default="zigzag", description="rank r of P holds chunks r and 2P-1-r of 2P; contiguous: chunk r of P"
    )
    pack_order: Literal["sequence", "documents"] = Field(
        default="sequence",
        description="of packed documents in a zigzag: the whole row is one, wherever documents end; documents: each is "
        "one of its own, padded to 2 * context_parallel_size * slc_block_len",
    )
    kv_fetch_budget_bytes: int | None = Field(
        default=None, description="bytes of other ranks' selected pages held at once; null: those of two head groups"
    )
    whole_shard_fraction: float = Field(
        default=1.0,
        description="from this share of a rank's blocks chosen on all of them are sent; read, each alone is as quick",
    )
    link_gb_per_s: float | None = Field(
        default=None,
        description="GB a rank sends in a second; head_groups follows from it, and so does whole_shard_fraction",
    )
    keep_pages: bool = Field(default=False, description="keep fetched pages for backward instead of fetching again")
    head_groups: int | None = Field(
        default=None,
        description="kv heads travel in so many groups, each under others' work; null: by sizes and link_gb_per_s",
    )
    transport: Literal["auto", "one_sided", "all_to_all"] = Field(
        default="auto",
        description="ranks read each other's GPU memory, or send by collectives; auto: they read where they can",
    )
    domain_size: int | None = Field(
        default=None,
        description="so many consecutive context-parallel ranks are near, as on one node; a page enters them once",
    )

    @field_validator("expert_model_parallel_size")
    @classmethod
    def _check_experts(cls, size: int) -> int:
        if size > 1:
            raise ValueError(
                f"expert_model_parallel_size={size} must be 1, because this trainer does not yet sum the gradients, "
                f"cut the checkpoints and compare the replicas of experts that ranks share; leave it out, and cut "
                f"every expert by tensor_model_parallel_size and sequence_parallel=true where all of them are too many"
            )
        return size

    @model_validator(mode="after")
    def _check_fetch(self) -> "ParallelSection":
        self.fetch_options().domain_of(self.context_parallel_size)
        return self

    def fetch_options(self) -> FetchOptions:
        """How the selected branch moves the blocks that other context-parallel ranks hold."""
        others: dict[str, Any] = {
            "kv_fetch_budget_bytes": self.kv_fetch_budget_bytes,
            "keep_pages": self.keep_pages,
            "head_groups": self.head_groups,
            "transport": self.transport,
            "domain_size": self.domain_size,
        }
        if self.link_gb_per_s is None:
            return FetchOptions(whole_shard_fraction=self.whole_shard_fraction, **others)
        if self.link_gb_per_s <= 0:
            raise ValueError(
                f"link_gb_per_s={self.link_gb_per_s:g} must be positive, because the time of sending is compared; pass "
                f"what one rank sends in a second in GB, `nsa-dist bench cp --gpus all` measures it, or null"
            )
        if self.whole_shard_fraction != 1.0:
            raise ValueError(
                f"link_gb_per_s={self.link_gb_per_s:g} and whole_shard_fraction={self.whole_shard_fraction:g} are both "
                f"given, but the first sets the second; leave one of them out"
            )
        return FetchOptions.for_link(1e9 * self.link_gb_per_s, **others)

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica of the model and one sequence."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
