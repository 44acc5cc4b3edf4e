"""NSA layers in stock Megatron-LM: `pretrain` is its `pretrain_gpt.py`, with `--nsa-...` beside its own arguments.

    arguments   the arguments of NSA, and the configuration that all of them make
    refusals    every argument of Megatron-LM about attention, positions, norms or data: done, refused, or of no effect
    models      the model, as Megatron-LM 0.16 asks for it and as the configuration container of 0.19 does
    counts      FLOPs of NSA where Megatron-LM counts dense attention
    resuming    checkpoints of NSA layers of other sizes
    running     the training script

For Megatron-LM of core 0.16 and of core 0.19. `megatron.training` and `pretrain_gpt` come with its checkout, not with
Megatron-core: they are imported when a function is called that needs them.
"""

from nsa_dist.mcore.megatron_lm.arguments import add_nsa_arguments, nsa_config_from_args
from nsa_dist.mcore.megatron_lm.models import build_gpt, gpt_model_config, hybrid_model_config, spec
from nsa_dist.mcore.megatron_lm.refusals import refuse_arguments
from nsa_dist.mcore.megatron_lm.running import pretrain

__all__ = [
    "add_nsa_arguments",
    "build_gpt",
    "gpt_model_config",
    "hybrid_model_config",
    "nsa_config_from_args",
    "pretrain",
    "refuse_arguments",
    "spec",
]
