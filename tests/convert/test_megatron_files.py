"""What of a checkpoint of Megatron's is refused, and that nothing in it is executed."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_checkpoints import ARGUMENTS, stacked
from megatron_checkpoints import write_without_megatron as write
from nsa_dist.convert.megatron.arguments import ONLY, sizes
from nsa_dist.convert.megatron.files import is_megatron
from nsa_dist.convert.megatron.weights import read_megatron
from nsa_dist.mcore import settings
from train_cases import Trap

STACKED = "decoder.layers."


def read(folder: Path) -> object:
    return read_megatron(folder, "bytes", 0)


def test_what_is_written_is_what_is_read(tmp_path):
    assert is_megatron(write(tmp_path / "one"))
    assert not is_megatron(tmp_path)
    assert len(read(tmp_path / "one").weights) == 3 + 2 * 9


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"add_bias_linear": True}, "add_bias_linear=True, but needs False.*give a checkpoint of a model"),
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm', but needs 'RMSNorm'"),
        ({"swiglu": False}, "swiglu=False, but needs True"),
        ({"position_embedding_type": "learned_absolute"}, "but needs 'rope' or 'yarn'"),
        ({"num_experts": 8}, "num_experts=8, but needs None"),
        ({"spec": ["nsa_dist.mcore", "spec"]}, "spec=.*but needs None"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 4}, "needs one of them at most.*give a"),
        ({"hidden_size": None}, "lack a size.*give a checkpoint that Megatron-LM's own training saved"),
        ({"rotary_percent": 0.25}, "rotary positions turn pairs.*take percent"),
        ({"ffn_hidden_size": 64}, r"linear_fc1.weight \[2, 160, 48\].*not what its arguments describe"),
        ({"num_query_groups": 4}, r"linear_qkv.weight \[2, 96, 48\]"),
        ({"qk_layernorm": True}, "q_norm.weight missing.*as Megatron-LM saved it"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path, change, remedy):
    with pytest.raises(ValueError, match=remedy):
        read(write(tmp_path / "one", change))


BIAS, NORM = f"{STACKED}self_attention.linear_qkv.bias", f"{STACKED}input_layernorm.weight"


@pytest.mark.parametrize(
    ("more", "less", "remedy"),
    [
        ({BIAS: (2, 96)}, (), rf"{BIAS} \[2, 96\].*would be lost"),
        ({NORM: (2, 48)}, (), "layers.0.input_layernorm.weight twice"),
        ({f"{STACKED}2.mlp.linear_fc2.weight": (48, 80)}, (), "which is not what its arguments describe"),
        ({}, ("output_layer.weight",), "lm_head.weight missing.*unknown"),
    ],
)
def test_a_tensor_without_a_place_and_one_that_is_missing_are_refused(tmp_path, more, less, remedy):
    tensors = {name: x for name, x in stacked().items() if name not in less}
    with pytest.raises(ValueError, match=remedy):
        read(write(tmp_path / "one", None, tensors | {name: torch.zeros(shape) for name, shape in more.items()}))


def test_files_that_are_missing_cut_or_of_other_formats_are_refused(tmp_path):
    folder = write(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert read(tmp_path).weights.keys() == read(folder).weights.keys()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(ValueError, match="has no such iteration; name the folder of one that is there"):
        read(tmp_path)
    pieces = folder / "__0_0.distcp"
    whole = pieces.read_bytes()
    pieces.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is missing or cut.*copy the folder again"):
        read(folder)
    pieces.write_bytes(b"\0" * len(whole))
    with pytest.raises(ValueError, match=r"cannot be read as a torch_dist checkpoint.*copy the folder again"):
        read(folder)
    (folder / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"holds no args.*give a checkpoint that Megatron-LM's own training saved"):
        read(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="--ckpt-convert-format torch_dist"):
        read(folder)


def test_a_part_of_a_tensor_that_no_piece_holds_is_refused(tmp_path):
    folder = write(tmp_path / "one")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["output_layer.weight"].chunks.clear()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"output_layer.weight with 0 numbers.*would be unknown; copy the folder"):
        read(folder)


class Copying:
    """Reading the pickle of one copies a file."""

    def __init__(self, source: Path, target: Path) -> None:
        self.paths = str(source), str(target)

    def __reduce__(self) -> tuple:
        return shutil.copy, self.paths


def test_nothing_in_the_files_is_executed(tmp_path):
    trap, source, copied = Trap(tmp_path / "executed"), tmp_path / "source", tmp_path / "copied"
    source.write_text("")
    folder = write(tmp_path / "one", {"exit_signal": Copying(source, copied)})
    assert read(folder).hidden_size == 48
    assert not copied.exists()
    torch.load(folder / "common.pt", weights_only=False)
    assert copied.exists()
    folder = write(tmp_path / "two", another=trap)
    with pytest.raises(ValueError, match=r"holds more than arguments.*take another iteration"):
        read(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match=r"it names .*, which is no class of this format"):
        read(folder)
    assert not trap.path.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert trap.path.exists()


def words(text: str) -> set[str]:
    return set(text.split())


# Settings of Megatron's that are not asked for: they change how a model is trained, or how exactly it computes.
TRAINING = words(
    """
    apply_query_key_layer_scaling attention_dropout batch_invariant_mode cpu_offloading cuda_graph_impl
    enable_cuda_graph external_cuda_graph flash_decode fp4 fp8 fp8_dot_product_attention fp8_multi_head_attention
    fused_residual_rmsnorm fused_single_qkv_rope gtp_weight_remat_size expert_gtp_weight_remat_size
    hybrid_context_parallel init_model_with_meta_device log_max_attention_logit overlap_moe_expert_parallel_comm
    qk_clip tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards tp_comm_overlap
    transformer_impl use_grouped_gemm_for_dense_mlp use_inference_optimized_layers use_kitchen use_kitchen_attention
    use_te_activation_func use_transformer_engine_op_fuser context_parallel_size delay_wgrad_compute
    deterministic_mode init_method output_layer_init_method perform_initialization recompute_granularity
    recompute_modules sequence_parallel tensor_model_parallel_size use_cpu_initialization params_dtype
    activation_func_fp8_input_store bias_activation_fusion bias_dropout_fusion distribute_saved_activations
    fp32_residual_connection gradient_accumulation_fusion hidden_dropout init_method_std mlp_chunks_for_training
    recompute_method recompute_num_layers
    """
)
OTHERWISE = {  # what else says the same
    "activation_func": "swiglu", "gated_linear_unit": "swiglu", "use_fused_weighted_squared_relu": "squared_relu",
    "heterogeneous_block_specs": "heterogeneous_layers_config_path", "window_attn_skip_freq": "window_size",
    "apply_residual_connection_post_layernorm": None,  # Megatron-core's layers ignore it
}  # fmt: skip


def test_every_setting_of_layers_is_asked_for_or_known_to_change_nothing(tmp_path):
    asked = {"layernorm_zero_centered_gamma"}  # with the weights

    class Watched(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

    sizes(Watched(ARGUMENTS), tmp_path)
    honoured = ("by the attention", "by the norms", "by Megatron's layer and MLP around the attention")
    decided = settings.REFUSED.keys() | {name for kind in honoured for name in settings.HONOURED[kind]}
    names = decided & TransformerConfig.__dataclass_fields__.keys()
    assert len(names) > 50
    assert names - asked - TRAINING - OTHERWISE.keys() == set()
    assert {name for name in OTHERWISE.values() if name} <= asked
    assert ONLY.keys() <= asked
