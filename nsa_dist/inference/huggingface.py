"""An exported folder in `transformers` (extra `hf`): `import nsa_dist.inference.huggingface` registers the classes.

    AutoModelForCausalLM.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR), model.generate(...)

The model is `nsa_dist.inference.model.GPT` under the conventions of that package; `GPT` itself needs torch alone.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa_dist.inference.generate import PREFILL_CHUNK
from nsa_dist.inference.model import GPT, GPTConfig
from nsa_dist.inference.storage import MOST_BACK

_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_IGNORED = -100  # a label that is none


class NSAGPTConfig(PreTrainedConfig):
    """`config.json` of an exported folder, which it reads and writes unchanged; `gpt()` are the sizes."""

    model_type = "nsa_gpt"
    sizes: dict | None = None  # the keys of `GPTConfig`

    def __post_init__(self, **kwargs: Any) -> None:
        if self.sizes is not None:
            gpt = GPTConfig.of_json({"model_type": self.model_type, **self.sizes})
            self.dtype = getattr(self, "dtype", None) or gpt.torch_dtype
            self.vocab_size, self.hidden_size = gpt.vocab_size, gpt.hidden_size
            self.num_hidden_layers, self.num_attention_heads = gpt.num_layers, gpt.num_q_heads
            self.num_key_value_heads, self.head_dim = gpt.num_kv_heads, gpt.head_dim
            self.max_position_embeddings = gpt.sequence_length
            self.eos_token_id = self.pad_token_id = gpt.end_of_document
            self.tie_word_embeddings = False  # a tied output has no weight of its own here
        super().__post_init__(**kwargs)

    def gpt(self) -> GPTConfig:
        """ValueError for a dtype with which runs are not trained."""
        name = str(self.dtype).removeprefix("torch.")  # the package has it as a string at times
        if self.sizes is None or name not in _DTYPES:
            raise ValueError(
                f"dtype={self.dtype} and sizes={self.sizes} are no model of nsa-dist export, which are float32 or "
                f"bfloat16, as runs are trained; load an exported folder with dtype='auto', 'float32' or 'bfloat16'"
            )
        config = GPTConfig.of_json({"model_type": self.model_type, **self.sizes})
        return replace(config, dtype=_DTYPES[name])  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of the JSON of an exported folder. ValueError for keys that mean nothing here."""
        sizes = asdict(GPTConfig.of_json({key: x for key, x in config_dict.items() if key != "sizes"}))
        return super().from_dict({"sizes": sizes}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of an exported folder: torch alone reads what `save_pretrained` writes."""
        return super().to_dict() if self.sizes is None else self.gpt().as_json()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class NSAModelCache(Cache):
    """A paged cache of all layers, a sequence a row of the batch; padding takes no place in it.

    batch_size, max_tokens      rows, and tokens of each at most: pages are made at once. Forks of beams share them
    """

    def __init__(self, model: GPT, batch_size: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        page = model.config.nsa.slc_block_len
        self.pages = model.make_cache(max_tokens + page, batch_size)  # a page more: a fork copies its last one
        self.seqs = [self.pages.new_sequence() for _ in range(batch_size)]
        self.columns = 0  # of the batch's rows, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.seqs)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row `beam_idx[i]` has: the first to take it has it itself, others a fork."""
        wanted, taken = [self.seqs[index] for index in beam_idx.tolist()], set[int]()
        for seq in set(self.seqs) - set(wanted):
            self.pages.free(seq)
        rows = []
        for seq in wanted:
            rows.append(self.pages.fork(seq) if seq in taken else seq)
            taken.add(seq)
        self.seqs = rows

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.seqs)).repeat_interleave(repeats))

    def update(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "update was called on the cache of an NSA model, whose layers append to its pages themselves; call the "
            "model with cache=..., and nothing else with it"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > MOST_BACK:
            raise ValueError(
                f"crop({tokens_to_remove}) takes back more than the {MOST_BACK} tokens that rings hold besides the "
                f"window; keep assistants to fewer tokens at once (num_assistant_tokens), or generate without one"
            )
        for seq in self.seqs:
            self.pages.truncate(seq, self.pages.length(seq) - tokens_to_remove)
        self.columns -= tokens_to_remove

    def reset(self) -> None:
        self.seqs = [self._emptied(seq) for seq in self.seqs]
        self.columns = 0

    def _emptied(self, seq: int) -> int:
        self.pages.free(seq)
        return self.pages.new_sequence()


class NSAGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """`GPT` with the arguments of `transformers`. What they ask for and is not done is refused."""

    config_class = NSAGPTConfig
    _no_split_modules = ("Block",)

    def __init__(self, config: NSAGPTConfig) -> None:
        super().__init__(config)
        gpt = GPT(config.gpt())
        self._end_documents()
        # The same modules under the same names as in the folder; `gpt` is no module here, so weights have one name.
        self.embedding, self.blocks, self.norm, self.output = gpt.embedding, gpt.blocks, gpt.norm, gpt.output
        object.__setattr__(self, "gpt", gpt)
        self.post_init()

    def _end_documents(self) -> None:
        """`generate` stops where a document ends, unless a `generation_config.json` says otherwise."""
        if getattr(getattr(self, "generation_config", None), "eos_token_id", None) is None:
            end = self.config.eos_token_id
            self.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)

    def adjust_generation_fn(self, *options: Any, **others: Any) -> None:
        """What `from_pretrained` calls to read generation_config.json, which an exported folder has not."""
        super().adjust_generation_fn(*options, **others)
        self._end_documents()

    def _init_weights(self, module: nn.Module) -> None:
        """As PyTorch makes modules."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ValueError(
            f"the embedding of an NSA model cannot be exchanged for {type(value).__name__}: its rows are the tokens of "
            f"the run; train a run with the vocabulary that is needed, and export that"
        )

    def get_output_embeddings(self) -> nn.Module | None:
        return self.output

    def new_cache(self, batch_size: int, max_tokens: int) -> NSAModelCache:
        """For `cache=`; `generate` makes its own."""
        return NSAModelCache(self.gpt, batch_size, max_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: NSAModelCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """input_ids [B, T] -> logits [B, T, vocab], of the last `logits_to_keep` columns if that is not 0.

        attention_mask  [B, T], or with a cache [B, columns so far + T]: 0 is padding, wherever it stands. It is left
                        out, takes no position, and its logits are 0
        position_ids    must be what follows from the mask
        cache           of `new_cache`; without one the whole text is given each time
        labels          [B, T], -100 for none: the mean loss of the next tokens

        Raises ValueError for all other arguments but `use_cache`, and for that without a cache.
        """
        self._refuse(input_ids, cache, use_cache, others)
        assert input_ids is not None
        valid = _valid(input_ids, attention_mask, cache)
        self._check_positions(valid, position_ids, cache)
        keep = valid.clone()
        if logits_to_keep and labels is None:
            keep[:, :-logits_to_keep] = False
        logits = self._whole(input_ids, valid, keep) if cache is None else self._cached(input_ids, valid, keep, cache)
        loss = None if labels is None else _loss(logits, labels, valid)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        out = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return out.to_tuple() if return_dict is False else out

    def _whole(self, tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        bounds = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).tolist()
        found = self.gpt(tokens[valid], cu_seqlens=bounds, rows=keep[valid].nonzero().squeeze(1))
        return _placed(found, keep)

    def _cached(self, tokens: Tensor, valid: Tensor, keep: Tensor, cache: NSAModelCache) -> Tensor:
        """Columns of as many tokens as `PREFILL_CHUNK` at once; one to eight of every row by `decode`."""
        width = tokens.shape[1]
        if width <= MOST_BACK and cache.columns and bool(valid.all()):
            found = self.gpt.decode(tokens, cache.pages, cache.seqs)
            cache.columns += width
            return found
        step = max(1, PREFILL_CHUNK // len(tokens))
        parts = []
        for start in range(0, width, step):
            some = slice(start, start + step)
            parts.append(self._prefilled(tokens[:, some], valid[:, some], keep[:, some], cache))
        cache.columns += width
        return torch.cat(parts, 1)

    def _prefilled(self, tokens: Tensor, valid: Tensor, keep: Tensor, cache: NSAModelCache) -> Tensor:
        if not bool(valid.any()):
            return self.embedding.weight.new_zeros(*tokens.shape, self.gpt.config.vocab_size)
        bounds = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).tolist()
        rows = keep[valid].nonzero().squeeze(1)
        return _placed(self.gpt.prefill(tokens[valid], cache.pages, cache.seqs, bounds, rows=rows), keep)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """What `generate` calls: a cache of ours with room for all that will be generated."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is for dense attention, and an NSA "
                f"model keeps pages, compressed keys and a window; leave it out"
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["cache"] = self.new_cache(rows, max_cache_length + 1)

    def _refuse(self, input_ids: Tensor | None, cache: Any, use_cache: bool | None, others: dict[str, Any]) -> None:
        asked = sorted(name for name, value in others.items() if value is not None and value is not False)
        if asked or input_ids is None:
            raise ValueError(
                f"{', '.join(asked) or 'no input_ids'} was given, and this model takes input_ids, attention_mask, "
                f"position_ids, cache, labels and logits_to_keep: attention weights are never whole, and hidden states "
                f"are not kept; leave it out, or take nsa_dist.inference.model.GPT and its modules"
            )
        if cache is not None and not isinstance(cache, NSAModelCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}, which holds dense keys and values, and an NSA model keeps pages, "
                f"compressed keys and a window; pass model.new_cache(batch_size, max_tokens)"
            )
        if use_cache and cache is None:
            raise ValueError(
                "use_cache=True was given without a cache, whose pages are made at once, so that its size must be "
                "known; pass cache=model.new_cache(batch_size, max_tokens), or call generate, which makes one"
            )

    def _check_positions(self, valid: Tensor, position_ids: Tensor | None, cache: NSAModelCache | None) -> None:
        if position_ids is None:
            return
        before = torch.zeros(len(valid), dtype=torch.int64, device=valid.device)
        if cache is not None:
            before = torch.tensor([cache.pages.length(seq) for seq in cache.seqs], device=valid.device)
        expected = before[:, None] + valid.cumsum(1) - 1
        if position_ids.shape[-1] != valid.shape[1] or bool(((position_ids != expected) & valid).any()):
            raise ValueError(
                "position_ids differ from the places of the tokens, and the cache counts those itself; leave "
                "position_ids out, and mark padding in attention_mask"
            )


def _valid(input_ids: Tensor, attention_mask: Tensor | None, cache: NSAModelCache | None) -> Tensor:
    """bool [B, T]: what is no padding."""
    if cache is not None and cache.batch_size != len(input_ids):
        raise ValueError(
            f"input_ids has {len(input_ids)} rows and the cache {cache.batch_size}: a row of the cache is a text; pass "
            f"a cache of new_cache({len(input_ids)}, ...)"
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    columns = input_ids.shape[1] + (0 if cache is None else cache.columns)
    if attention_mask.dim() != 2 or attention_mask.shape[1] not in (columns, input_ids.shape[1]):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must be [B, {columns}], 1 for tokens and 0 for padding: "
            f"attention is causal and sparse, and takes no other mask; pass the tokenizer's"
        )
    return attention_mask[:, -input_ids.shape[1] :].bool()


def _placed(found: Tensor, keep: Tensor) -> Tensor:
    """Logits of packed tokens at their places, [B, T, vocab]; 0 elsewhere."""
    return found.new_zeros(*keep.shape, found.shape[-1]).index_put((keep.nonzero(as_tuple=True)), found)


def _loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The mean loss of the tokens that follow; padding is none."""
    wanted = labels.masked_fill(~valid, _IGNORED)[:, 1:].flatten()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=_IGNORED)


AutoConfig.register(NSAGPTConfig.model_type, NSAGPTConfig)
AutoModelForCausalLM.register(NSAGPTConfig, NSAGPTForCausalLM)
