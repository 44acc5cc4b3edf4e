"""The section `model`: sizes of a GPT, what its layers attend by, experts in the place of their MLPs, and how many
tokens ahead it predicts.
"""

from typing import Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from nsa_dist.config import layer_attentions
from nsa_dist.train.sections.section import Section
from nsa_kernels.common.sizes import round_up

OfLayer = TypeVar("OfLayer")


class ModelSection(Section):
    """A GPT decoder over bytes, or the vocabulary of `data.tokens`: RMSNorm, SwiGLU, no biases, no dropout."""

    attention: str | list[str] = Field(
        default="nsa",
        description="of the layers: nsa, dense, or a list of these words, one a layer, that repeats until the layers "
        "end, such as [nsa, nsa, nsa, dense]",
    )
    num_layers: int = Field(default=2, ge=1, description="decoder layers")
    hidden_size: int = Field(default=128, ge=1, description="width of what goes from layer to layer")
    num_attention_heads: int = Field(default=4, ge=1, description="query heads")
    num_query_groups: int = Field(default=1, ge=1, description="key/value heads")
    head_dim: int = Field(default=32, ge=2, description="numbers in a query, a key or a value")
    ffn_hidden_size: int = Field(default=384, ge=1, description="width inside the MLP")
    init_std: float = Field(
        default=0.02,
        gt=0,
        description="standard deviation of initial weights; output projections: / sqrt(2 * num_layers)",
    )
    embedding_init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial embedding")
    tie_embeddings: bool = Field(default=False, description="one matrix for the embedding and the output layer")
    norm_eps: float = Field(default=1e-5, gt=0, description="added to the mean of squares in every norm")
    qk_norm: Literal["rms", "l2"] | None = Field(
        default=None,
        description="norm of each query and of each branch's keys: rms with weights, as Qwen 3 has it, l2 without",
    )
    recompute_attention: bool = Field(default=False, description="run the attention again in backward, keep nothing")
    num_experts: int | None = Field(
        default=None, ge=2, description="MLPs of a layer, of which each token takes moe_router_topk; null: one for all"
    )
    moe_layer_freq: int | list[int] = Field(
        default=1,
        description="which layers have experts: every so many, from the first on; or 1 or 0 (one MLP) for each layer",
    )
    moe_router_topk: int = Field(default=2, ge=1, description="experts that a token takes")
    moe_ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="width inside an expert; null: ffn_hidden_size"
    )
    moe_shared_expert_intermediate_size: int | None = Field(
        default=None, ge=1, description="width inside an MLP beside the experts that every token takes; null: none"
    )
    moe_router_pre_softmax: bool = Field(
        default=False,
        description="experts weigh what a softmax over all of them says, as in DeepSeek's first models; false: over "
        "those that are taken",
    )
    moe_aux_loss_coeff: float = Field(
        default=0.01, ge=0, description="of the loss that evens the experts' shares of each sample's tokens"
    )
    mtp_num_layers: int | None = Field(
        default=None,
        ge=1,
        description="layers of multi-token prediction: the k-th predicts the token k behind the next one; null: none",
    )
    mtp_loss_scaling_factor: float = Field(
        default=0.1, ge=0, description="what the mean of their losses weighs beside the loss of the next token"
    )

    @field_validator("attention")
    @classmethod
    def _shortest(cls, attention: str | list[str]) -> str | list[str]:
        """A pattern in its shortest form, so that a model has one."""
        words = [attention] if isinstance(attention, str) else attention
        divisors = (n for n in range(1, len(words) + 1) if len(words) % n == 0)
        words = next((words[:n] for n in divisors if words[:n] * (len(words) // n) == words), words)
        return words[0] if len(words) == 1 else words

    @model_validator(mode="after")
    def _check_attention(self) -> "ModelSection":
        layer_attentions(self.attention, self.num_layers)
        return self

    @property
    def layer_attentions(self) -> tuple[str, ...]:
        """ "nsa" or "dense" for every layer."""
        return layer_attentions(self.attention, self.num_layers)

    @property
    def has_dense(self) -> bool:
        return "dense" in self.layer_attentions

    @property
    def layers_with_experts(self) -> tuple[bool, ...]:
        """Of every layer."""
        freq, layers = self.moe_layer_freq, range(self.num_layers)
        if self.num_experts is None:
            return (False,) * self.num_layers
        return tuple(layer % freq == 0 if isinstance(freq, int) else bool(freq[layer]) for layer in layers)

    @property
    def has_experts(self) -> bool:
        return self.num_experts is not None

    @property
    def num_mtp_layers(self) -> int:
        return self.mtp_num_layers or 0

    def with_mtp(self, layers: tuple[OfLayer, ...]) -> tuple[OfLayer, ...]:
        """Something of each of the model's layers, and behind them of its layers of multi-token prediction.

        These are as the last one is.
        """
        return layers + layers[-1:] * self.num_mtp_layers

    @property
    def expert_hidden_size(self) -> int:
        """Width inside an expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @model_validator(mode="after")
    def _check_experts(self) -> "ModelSection":
        if self.num_experts is None:
            self._refuse_without_experts()
            return self
        freq, layers, topk = self.moe_layer_freq, self.num_layers, self.moe_router_topk
        wrong = freq < 1 if isinstance(freq, int) else len(freq) != layers or set(freq) - {0, 1} or not any(freq)
        if wrong:
            raise ValueError(
                f"moe_layer_freq={freq} must be 1 or more, or a list of num_layers={layers} numbers, 0 or 1, that say "
                f"which layers have experts, one at least; take moe_layer_freq=1, and all of them have"
            )
        if topk > self.num_experts:
            raise ValueError(
                f"moe_router_topk={topk} must be at most num_experts={self.num_experts}, because a token takes each "
                f"expert once; take moe_router_topk={min(2, self.num_experts)}"
            )
        if topk == 1 and not self.moe_router_pre_softmax:
            raise ValueError(
                "moe_router_topk=1 needs moe_router_pre_softmax=true, because the softmax over one expert is 1 "
                "whatever the router says, and it would not learn; set moe_router_pre_softmax=true, or take "
                "moe_router_topk=2"
            )
        return self

    @model_validator(mode="after")
    def _check_mtp(self) -> "ModelSection":
        factor = self.mtp_loss_scaling_factor
        if self.mtp_num_layers is None and factor != ModelSection.model_fields["mtp_loss_scaling_factor"].default:
            raise ValueError(
                f"mtp_loss_scaling_factor={factor:g} without mtp_num_layers, but it weighs the losses of layers of "
                f"multi-token prediction, and there are none; give mtp_num_layers=1, or leave it out"
            )
        return self

    def _refuse_without_experts(self) -> None:
        fields = ModelSection.model_fields
        given = [name for name in fields if name.startswith("moe_") and getattr(self, name) != fields[name].default]
        if given:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in given)
            raise ValueError(
                f"{values} without num_experts, but it says something about experts, and each layer has one MLP; give "
                f"num_experts, or leave it out"
            )

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelSection":
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} must be a multiple of num_query_groups={groups}, so that every key/value "
                f"head serves as many query heads; take num_attention_heads={round_up(heads, groups)}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, because rotary positions turn pairs of numbers; "
                f"take head_dim={self.head_dim + 1}"
            )
        return self
