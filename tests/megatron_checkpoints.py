"""Dense GPTs of Megatron-core's own layers, their logits, and checkpoints of them as Megatron-LM saves them."""

import signal
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nsa_dist.mcore.cpu import megatron_on_cpu
from nsa_dist.mcore.norm import RMSNorm

TOKENS = 1024

# As Megatron-LM's command line names them: those that make a model that can be converted, small.
ARGUMENTS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2,
    "kv_channels": 12, "ffn_hidden_size": 80, "padded_vocab_size": 256, "seq_length": 2048, "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5, "layernorm_zero_centered_gamma": False, "swiglu": True, "add_bias_linear": False,
    "add_qkv_bias": False, "qk_layernorm": False, "position_embedding_type": "rope", "rotary_base": 50000,
    "rotary_percent": 1.0, "rotary_interleaved": False, "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False, "rope_scaling_factor": 8.0, "untie_embeddings_and_output_weights": True, "bf16": False,
    "num_experts": None, "spec": None, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0,
    "tokenizer_type": "NullTokenizer", "params_dtype": torch.float32, "model_type": ModelType.encoder_or_decoder,
    "attention_backend": AttnBackend.auto, "exit_signal": signal.SIGTERM,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "like Llama": {},
    "like Qwen 3, Llama 3's positions": {
        "qk_layernorm": True, "untie_embeddings_and_output_weights": False, "num_query_groups": 1, "kv_channels": 16,
        "use_rope_scaling": True, "rope_scaling_factor": 4.0, "layernorm_epsilon": 1e-6,
    },
    "YaRN": {
        "position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 256,
        "mscale": 0.7, "kv_channels": 16,
    },
    "norms around one, no groups, positions stretched": {
        "layernorm_zero_centered_gamma": True, "group_query_attention": False, "num_query_groups": 1,
        "rotary_percent": 0.5, "rotary_seq_len_interpolation_factor": 4, "kv_channels": 16,
    },
}  # fmt: skip
# Layers saved by themselves, with the names that norms have in the model.
BY_THEMSELVES = "layers by themselves, norms by their own names"
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2)}  # ranks of tensors, stages


def arguments_of(name: str) -> dict[str, Any]:
    return {**ARGUMENTS, **VARIANTS.get(name, {})}


def tokens() -> Tensor:
    return torch.arange(TOKENS) * 37 % 251


def everything(rank: int, folder: Path) -> dict[str, Tensor]:
    """The logits [T, vocabulary] of each variant, in fp64 but for angles; its checkpoint is in `folder / name`."""
    register_safe_globals()
    logits = {}
    with layout(1, 1):
        for name in (*VARIANTS, BY_THEMSELVES):
            model = build(arguments_of(name), own_names=name == BY_THEMSELVES)
            draw(model)
            save(model, folder / name, arguments_of(name), apart=name == BY_THEMSELVES)
            with torch.no_grad():
                logits[name] = model.double()(tokens()[None], torch.arange(TOKENS)[None], None)[0]
    return logits


def two_ranks(rank: int, folder: Path) -> None:
    """What one process saved as "like Llama", loaded and saved in each of LAYOUTS."""
    for name, sizes in LAYOUTS.items():
        with layout(*sizes):
            resaved(folder / "like Llama", folder / name, *sizes)


@contextmanager
def layout(tensor_parallel: int, pipeline: int) -> Iterator[None]:
    with megatron_on_cpu():
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline)
        try:
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            yield
        finally:
            parallel_state.destroy_model_parallel()


def build(arguments: dict[str, Any], tensor_parallel: int = 1, pipeline: int = 1, own_names: bool = False) -> GPTModel:
    """As Megatron-LM builds it of its arguments, of layers without Transformer Engine."""
    a = Namespace(**arguments)
    config = TransformerConfig(
        num_layers=a.num_layers, hidden_size=a.hidden_size, num_attention_heads=a.num_attention_heads,
        num_query_groups=a.num_query_groups if a.group_query_attention else None, kv_channels=a.kv_channels,
        ffn_hidden_size=a.ffn_hidden_size, normalization=a.normalization, layernorm_epsilon=a.layernorm_epsilon,
        layernorm_zero_centered_gamma=a.layernorm_zero_centered_gamma, gated_linear_unit=a.swiglu,
        activation_func=torch.nn.functional.silu, add_bias_linear=a.add_bias_linear, qk_layernorm=a.qk_layernorm,
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, apply_rope_fusion=False,
        masked_softmax_fusion=False, bias_activation_fusion=False, tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
    )  # fmt: skip
    for ours, theirs, default in (
        ("rotary_scaling_factor", "rotary_scaling_factor", 1.0), ("mscale", "mscale", 1.0),
        ("mscale_all_dim", "mscale_all_dim", 0.0), ("beta_fast", "yarn_beta_fast", 32.0),
        ("beta_slow", "yarn_beta_slow", 1.0),
        ("original_max_position_embeddings", "yarn_original_max_position_embeddings", 4096),
        ("correction_range_round_to_int", "yarn_correction_range_round_to_int", True),
    ):  # fmt: skip
        setattr(config, f"yarn_{ours}", arguments.get(theirs, default))
    return GPTModel(
        config,
        _spec(config, own_names),
        vocab_size=a.padded_vocab_size,
        max_sequence_length=TOKENS,
        position_embedding_type=a.position_embedding_type,
        rotary_percent=a.rotary_percent,
        rotary_base=a.rotary_base,
        rope_scaling=a.use_rope_scaling,
        rope_scaling_factor=a.rope_scaling_factor,
        seq_len_interpolation_factor=a.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not a.untie_embeddings_and_output_weights,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _spec(config: TransformerConfig, own_names: bool) -> ModuleSpec | TransformerBlockSubmodules:
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if own_names:
        spec.submodules.sharded_state_dict_keys_map = {}
    if not config.layernorm_zero_centered_gamma:
        return spec
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm  # Megatron's own has no such
    return TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=RMSNorm)


def draw(model: GPTModel) -> None:
    """Norms around what they are. Sharper attention would show that Megatron's angles, in fp32, are not exact."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.add_(torch.randn(x.shape) / 4)
            elif "embedding" in name:
                x.copy_(torch.randn(x.shape) * 0.4)
            else:
                x.copy_(torch.randn(x.shape) / x.shape[-1] ** 0.5)


def save(model: GPTModel, folder: Path, arguments: dict[str, Any], apart: bool = False) -> None:
    """As `--save folder` with `--ckpt-format torch_dist` after step 3, an optimizer's state beside the weights."""
    place = folder / "iter_0000003"
    place.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    weights = model.sharded_state_dict(metadata={"non_homogeneous_layers": apart})
    norm = model.sharded_state_dict().get("decoder.final_layernorm.weight")
    state = {"args": Namespace(**arguments), "iteration": 3, "model": weights}
    if norm is not None:
        norm.key = f"optimizer.state.exp_avg.{norm.key}"
        state["optimizer"] = {"exp_avg": norm}
    dist_checkpointing.save(state, str(place))


def resaved(source: Path, folder: Path, tensor_parallel: int, pipeline: int) -> None:
    """What `source` has, loaded into another layout and saved by it."""
    model = build(arguments_of(""), tensor_parallel, pipeline)
    state = {"model": model.sharded_state_dict()}
    model.load_state_dict(dist_checkpointing.load(state, str(source / "iter_0000003"))["model"])
    save(model, folder, arguments_of(""))


def stacked(vocab_size: int = ARGUMENTS["padded_vocab_size"]) -> dict[str, Tensor]:
    """Weights of the model of ARGUMENTS by Megatron's names, all layers in one, and an optimizer's."""
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (48,), "self_attention.linear_qkv.weight": (96, 48),
        "self_attention.linear_proj.weight": (48, 48), "mlp.linear_fc1.layer_norm_weight": (48,),
        "mlp.linear_fc1.weight": (160, 48), "mlp.linear_fc2.weight": (48, 80),
    }  # fmt: skip
    found = {f"decoder.layers.{name}": torch.randn(2, *shape) for name, shape in layer.items()}
    found |= dict.fromkeys(("embedding.word_embeddings.weight", "output_layer.weight"), torch.randn(vocab_size, 48))
    norms = ("decoder.final_layernorm.weight", "optimizer.state.exp_avg.decoder.final_layernorm.weight")
    return found | dict.fromkeys(norms, torch.randn(48))


def write_without_megatron(
    folder: Path, changes: dict | None = None, tensors: dict[str, Tensor] | None = None, **common: object
) -> Path:
    """One iteration's folder, as Megatron-core 0.16 writes it, of ARGUMENTS with changes."""
    arguments = {**ARGUMENTS, **(changes or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        weights = stacked(arguments["padded_vocab_size"]) if tensors is None else tensors
        dcp.save(weights, checkpoint_id=folder, no_dist=True)
    torch.save({"args": Namespace(**arguments), **common}, folder / "common.pt")
    return folder
