"""NSA inside Megatron-core models: `GPTModel(config, nsa_block_spec(config), ..., position_embedding_type="none")`."""

from nsa_dist.mcore.attention import NSASelfAttention
from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.dense import DenseSelfAttention
from nsa_dist.mcore.plans import prepare_pack
from nsa_dist.mcore.specs import nsa_block_spec, nsa_layer_spec, nsa_mtp_spec

__all__ = [
    "DenseSelfAttention",
    "NSASelfAttention",
    "NSATransformerConfig",
    "nsa_block_spec",
    "nsa_layer_spec",
    "nsa_mtp_spec",
    "prepare_pack",
]
