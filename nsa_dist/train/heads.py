"""Attention heads of one rank of a run."""

from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.train.config import TrainConfig


def local_heads(config: TrainConfig) -> HeadSizes:
    """Tensor parallelism splits the heads; elements are those of the run's dtype."""
    model, tensor_size = config.model, config.parallel.tensor_model_parallel_size
    return HeadSizes(
        num_q_heads=model.num_attention_heads // tensor_size,
        num_kv_heads=model.num_query_groups // tensor_size,
        dim_k=model.head_dim,
        dim_v=model.head_dim,
        element_bytes=2 if config.run.dtype == "bf16" else 4,
    )


def projected_width(config: TrainConfig) -> int:
    """Columns of an NSA layer's `linear_qkv` on one rank: queries, key/value pairs and gate logits."""
    heads, pairs = local_heads(config), 1 if config.nsa.shared_kv else 3
    return heads.num_q_heads * (heads.dim_k + 3) + pairs * heads.row_elements
