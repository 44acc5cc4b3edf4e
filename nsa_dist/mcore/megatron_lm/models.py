"""Models of NSA layers out of Megatron-LM's arguments, for both ways in which it asks for a model.

core 0.16    a function that builds: `partial(model_provider, build_gpt)`, in `gpt_builder`'s place
core 0.19    a configuration that names its builder: `pretrain_cfg_container_from_args(args, gpt_model_config(args))`
"""

from argparse import Namespace
from typing import Any, NoReturn

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from nsa_dist.mcore.config import NSATransformerConfig
from nsa_dist.mcore.cpu import replaced
from nsa_dist.mcore.megatron_lm.arguments import nsa_config_from_args
from nsa_dist.mcore.specs import Backend, nsa_block_spec, nsa_mtp_spec


def build_gpt(
    args: Namespace,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: NSATransformerConfig | None = None,
    pg_collection: Any = None,
) -> GPTModel:
    """The part of the model on this pipeline stage, all of its layers NSA, those of multi-token prediction too."""
    config = config or nsa_config_from_args(args)
    backend = backend_of(config)
    return GPTModel(
        config,
        nsa_block_spec(config, vp_stage, backend),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="none",  # the layers turn queries and keys, the model does nothing
        mtp_block_spec=nsa_mtp_spec(config, vp_stage, backend),
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def gpt_model_config(args: Namespace) -> Any:
    """Megatron-LM's GPTModelConfig (core 0.19 and later) of a model like that of `build_gpt`."""
    from megatron.training.argument_utils import gpt_config_from_args

    model = gpt_config_from_args(args, config=nsa_config_from_args(args))
    model.builder = f"{GPTBuilder.__module__}.{GPTBuilder.__name__}"
    model.transformer_layer_spec = stage_spec
    model.position_embedding_type = "none"
    return model


def hybrid_model_config(args: Namespace) -> Any:
    """Megatron-LM's HybridModelConfig (core 0.19 and later), NSA wherever `--hybrid-layer-pattern` has attention.

    ValueError for `--transformer-impl transformer_engine`, and when it is built for layers that the stack has not.
    """
    from megatron.training.argument_utils import hybrid_config_from_args

    from nsa_dist.mcore.hybrid.stack import nsa_stack_spec

    config = nsa_config_from_args(args)
    if backend_of(config) != "local":
        raise ValueError(
            f"--transformer-impl is {config.transformer_impl!r}, but --hybrid-layer-pattern needs 'local': the stack "
            f"of NSA layers is of Megatron-core's own layers; write --transformer-impl local, or --num-layers"
        )
    model = hybrid_config_from_args(args, config=config)
    model.hybrid_stack_spec = nsa_stack_spec(config)
    model.position_embedding_type = "none"
    return model


class GPTBuilder:
    """Megatron-LM's GPTModelBuilder, which by itself would predict further tokens by dense layers."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        return self._built("build_model", *args, **kwargs)

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self._built("build_distributed_models", *args, **kwargs)

    def _built(self, method: str, *args: Any, **kwargs: Any) -> Any:
        from megatron.training.models import gpt

        with replaced(gpt, "mtp_block_spec", _mtp_spec):
            return getattr(gpt.GPTModelBuilder(self._model_config), method)(*args, **kwargs)


def stage_spec(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of a stage, of a GPTModelConfig whose `transformer` is an NSATransformerConfig."""
    config = model_config.transformer
    return nsa_block_spec(config, vp_stage, backend_of(config))


def _mtp_spec(model_config: Any, layers: Any, vp_stage: int | None = None) -> Any:
    config = model_config.transformer
    return nsa_mtp_spec(config, vp_stage, backend_of(config))


def backend_of(config: Any) -> Backend:
    """`--transformer-impl`; others are refused when the configuration is made."""
    return "local" if config.transformer_impl == "local" else "transformer_engine"


class _NeedsItsScript(TransformerLayer):
    """What `--spec` of a script for dense layers comes to."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"--spec nsa_dist.mcore.megatron_lm spec was given a {type(config).__name__}, but NSA layers need an "
            f"NSATransformerConfig, made of --nsa-... arguments, which pretrain_gpt.py does not have; run "
            f"examples/megatron_lm/pretrain_nsa.py with the same arguments, or your script with "
            f"nsa_dist.mcore.megatron_lm"
        )


spec = ModuleSpec(module=_NeedsItsScript)  # `--spec nsa_dist.mcore.megatron_lm spec`
