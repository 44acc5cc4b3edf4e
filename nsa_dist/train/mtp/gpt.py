"""A GPT that predicts tokens behind the next one as well."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn, stack


class PredictingGPT(GPTModel):
    """Megatron's model and its layers of multi-token prediction, told what each of them has to predict.

    Depth k reads what depth k - 1 made of token i (depth 0: the decoder's output) and the embedding of token i + k,
    and predicts token i + k + 1 through the one output layer (DeepSeek-V3, arXiv:2412.19437, section 2.2):

        h_k = layer_k(proj_k([norm(embedding of token i + k) | norm(h_{k-1})]))

    `labels` [b, T] give losses [b, T] of the next token, `labels` [b, T, 1 + depths] those of all depths, in their
    order; without labels there are logits of the next token. Token i + k is the label of depth k - 1.

    Megatron's own shift of tokens and labels knows neither contiguous shards nor a zigzag over a pack's whole row, and
    the weight that it gives to the losses depends on how tokens are cut: docs/decisions/multi-token-prediction.md.
    """

    def __init__(self, *arguments: Any, **by_name: Any) -> None:
        super().__init__(*arguments, **by_name)
        # A last stage that also has the embedding needs no other copy of what is tied to it. Megatron makes one, trains
        # it on nothing, and asserts that there is none when it saves.
        if self.post_process and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None = None, packed_seq_params: Any = None, **unused: Any
    ) -> Tensor:
        if not self.post_process:
            return hidden_states
        if labels is None:
            return self._logits(hidden_states).transpose(0, 1).contiguous()
        if labels.dim() == 2:
            return self.compute_language_model_loss(labels, self._logits(hidden_states))
        by_depth = [x.contiguous() for x in labels.unbind(-1)]
        losses = [self.compute_language_model_loss(by_depth[0], self._logits(hidden_states))]
        for layer, token, label in zip(self.mtp.layers, by_depth[:-1], by_depth[1:], strict=True):
            hidden_states = layer._proj_and_transformer_layer(
                hidden_states=hidden_states,
                decoder_input=self.embedding(input_ids=token, position_ids=None),
                packed_seq_params=packed_seq_params,
            )
            losses.append(self.compute_language_model_loss(label, self._logits(hidden_states)))
        return stack(losses, -1)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """[T, b, vocabulary of this tensor-parallel rank]."""
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else None
        return self.output_layer(hidden_states, weight=weight)[0]


def inner_layer(of: Any) -> Any:
    """The transformer layer in one of multi-token prediction, or its spec among that layer's submodules."""
    name = "mtp_model_layer" if hasattr(of, "mtp_model_layer") else "transformer_layer"  # the older name
    return getattr(of, name)


def layers_of(model: GPTModel) -> dict[int, nn.Module]:
    """Of this pipeline stage, by number from 0; those of multi-token prediction come behind the decoder's.

    Megatron-core 0.16 numbers these so, too; 0.19 begins again at 1.
    """
    of_mtp = getattr(model, "mtp", None)
    ahead = () if of_mtp is None else of_mtp.layers
    found = {layer.layer_number - 1: layer for layer in model.decoder.layers}
    return found | {model.config.num_layers + k: inner_layer(layer) for k, layer in enumerate(ahead)}
