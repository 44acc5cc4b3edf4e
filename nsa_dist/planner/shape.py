"""What one rank holds of a run: its tokens, heads and parameters, for a context-parallel size and layout."""

from dataclasses import dataclass, replace
from functools import cached_property

from nsa_dist.cp.formulas.batches import batch_plan, call_plan
from nsa_dist.cp.formulas.cost import HeadSizes
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.planner.core.mlp import LayerMLP
from nsa_dist.planner.core.sizes import Core
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.heads import local_heads, projected_width
from nsa_dist.train.tokens.sets import padded_vocab_size


@dataclass(frozen=True)
class Shape:
    """One rank's part, from the configuration alone: no process group, no model, no GPU.

    Parameters and saved tensors are those of `nsa_dist.train.model`, layer by layer; tests hold both to a model that
    is really built.
    """

    config: TrainConfig
    plan: ShardPlan

    @classmethod
    def of(cls, config: TrainConfig, cp_size: int, layout: str) -> "Shape":
        """One document over the whole sequence, as the trainer makes it."""
        make = {"zigzag": ShardPlan.zigzag, "contiguous": ShardPlan.contiguous}[layout]
        return cls(config, make([0, config.run.sequence_length], cp_size, config.nsa.slc_block_len))

    def with_shared_kv(self) -> "Shape":
        """The same model but for one K/V pair in each layer, which all branches share."""
        nsa = self.config.nsa.model_copy(update={"shared_kv": True})
        return replace(self, config=self.config.model_copy(update={"nsa": nsa}))

    # --- sizes -----------------------------------------------------------------------------------------------

    @property
    def tensor_size(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def num_stages(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def most_layers(self) -> int:
        """Of a pipeline stage."""
        return max(len(self.mlps(stage)) for stage in range(self.num_stages))

    def mtp_layers(self, stage: int) -> int:
        """Of multi-token prediction: the last stage has all."""
        return self.config.model.num_mtp_layers if stage == self.num_stages - 1 else 0

    @property
    def gpus_per_replica(self) -> int:
        return self.tensor_size * self.num_stages * self.plan.cp_size

    @property
    def element_bytes(self) -> int:
        return self.heads.element_bytes

    @property
    def batch(self) -> int:
        """Sequences of one micro batch."""
        return self.config.run.micro_batch_size

    @property
    def calls(self) -> int:
        """Of the attention of one layer for one micro batch."""
        return self.batch // self.call_plan.num_documents

    @cached_property
    def call_plan(self) -> ShardPlan:
        """Of the samples that one such call computes together: a micro-batch that is a pack has one call."""
        if self.config.data.is_packed:
            return batch_plan(self.plan, self.batch)
        return call_plan(self.plan, self.batch, self.heads.num_q_heads * self.heads.dim_k)

    @property
    def tokens(self) -> int:
        """Of one micro batch on this rank."""
        return self.plan.tokens_per_rank * self.batch

    @property
    def norm_share(self) -> float:
        """Part of the hidden states that a rank keeps outside the linear layers."""
        return 1 / self.tensor_size if self.config.parallel.sequence_parallel else 1.0

    @cached_property
    def heads(self) -> HeadSizes:
        return local_heads(self.config)

    @cached_property
    def core(self) -> Core:
        """The attention of one layer, one call: so many samples of a micro batch as are computed together."""
        return Core(self.call_plan, self.config.nsa.sizes(), self.heads, self.phi_hidden_dims, self.tensor_size)

    @property
    def kv_pairs(self) -> int:
        """K/V pairs that a layer projects: one a branch, or one for all."""
        return 1 if self.config.nsa.shared_kv else 3

    @property
    def phi_hidden_dims(self) -> tuple[int, ...]:
        """Hidden sizes of the MLPs that compress K and V."""
        return (self.heads.dim_k, self.heads.dim_v) if self.config.nsa.compression == "mlp" else ()

    def mlps(self, stage: int) -> list[LayerMLP]:
        """Of the layers of a pipeline stage, those of multi-token prediction among them."""
        has_experts, per_stage = self.config.model.layers_with_experts, self.config.model.num_layers // self.num_stages
        here = has_experts[stage * per_stage :][:per_stage] + has_experts[-1:] * self.mtp_layers(stage)
        return [self._experts if experts else self._mlp for experts in here]

    @property
    def _mlp(self) -> LayerMLP:
        model = self.config.model
        return LayerMLP(model.hidden_size, model.ffn_hidden_size // self.tensor_size)

    @property
    def _experts(self) -> LayerMLP:
        model, size = self.config.model, self.tensor_size
        shared = (model.moe_shared_expert_intermediate_size or 0) // size
        sizes = model.hidden_size, model.expert_hidden_size // size
        return LayerMLP(*sizes, model.num_experts or 0, model.moe_router_topk, shared)

    @cached_property
    def local_vocab(self) -> int:
        return padded_vocab_size(self.config) // self.tensor_size

    # --- parameters of one rank ------------------------------------------------------------------------------

    @property
    def qkv_width(self) -> int:
        return projected_width(self.config)

    @property
    def projection_parameters(self) -> int:
        """Of one layer's attention: what multiplies every token."""
        hidden, heads = self.config.model.hidden_size, self.heads
        return hidden * (self.qkv_width + heads.num_q_heads * heads.dim_v)

    @property
    def phi_parameters(self) -> int:
        """Of one layer: position embedding and two matrices, for K and for V, for every key/value head."""
        block_len = self.config.nsa.cmp_block_len
        dims = zip((self.heads.dim_k, self.heads.dim_v), self.phi_hidden_dims, strict=False)
        return self.heads.num_kv_heads * sum(
            block_len * dim + block_len * dim * hidden + hidden * dim for dim, hidden in dims
        )

    def layer_parameters(self, mlp: LayerMLP) -> int:
        return self.projection_parameters + mlp.parameters + self.phi_parameters + 2 * self.config.model.hidden_size

    @property
    def mtp_projection_parameters(self) -> int:
        """Of one layer of multi-token prediction: of an embedding and a hidden state it makes one row."""
        return 2 * self.config.model.hidden_size**2 // self.tensor_size

    def stage_multiplications(self, stage: int) -> int:
        """Of one token in the linear layers of a stage, but for the output layer after the decoder."""
        ahead = self.mtp_projection_parameters + self.local_vocab * self.config.model.hidden_size
        layers = sum(self.projection_parameters + mlp.active_parameters for mlp in self.mlps(stage))
        return layers + self.mtp_layers(stage) * ahead

    def stage_parameters(self, stage: int) -> int:
        """Of one pipeline stage: its layers, the embedding on the first, the final norm and the output on the last.

        Layers of multi-token prediction have three norms more, and need the embedding as well.
        """
        hidden = self.config.model.hidden_size
        embedding = self.local_vocab * hidden
        is_first, is_last = stage == 0, stage == self.num_stages - 1
        ahead = self.mtp_layers(stage)
        has_embedding = is_first or ahead > 0
        has_output = is_last and not (has_embedding and self.config.model.tie_embeddings)
        return (
            sum(map(self.layer_parameters, self.mlps(stage)))
            + ahead * (self.mtp_projection_parameters + 3 * hidden)
            + has_embedding * embedding
            + has_output * embedding
            + is_last * hidden
        )
