"""A GPT of NSA layers in plain PyTorch, as `nsa_dist.train` trains it: what an exported folder holds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.inference.cache import NSACache
from nsa_dist.layer import NSALayer, next_positions
from nsa_dist.rope_scaling import Rotary, scaling_of


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; `config.json` of an exported folder has these names."""

    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    nsa: NSAConfig
    vocab_size: int = 256
    v_head_dim: int | None = None  # None: head_dim
    shared_kv: bool = False
    compression: Literal["mlp", "mean"] = "mlp"
    compress_before_rope: bool = True
    rotary_base: float = 10_000.0
    rotary_percent: float = 1.0
    rope_scaling: dict[str, Any] | None = None  # as in a config.json of Hugging Face: nsa_dist.rope_scaling.scaling_of
    no_rope: list[int] | None = None  # 1 for each layer without positions, else 0; None: all have them
    qk_norm: Literal["rms", "l2"] | None = None
    gate_bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    num_experts: int | None = None  # of a layer's MLP; None: one MLP, and no other key of experts says anything
    moe_layer_freq: list[int] | None = None  # 1 for each layer with experts, else 0; None: all have them
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False  # weights of a softmax over all experts, not over those that are taken
    moe_ffn_hidden_size: int | None = None  # None: ffn_hidden_size
    moe_shared_expert_intermediate_size: int | None = None  # of an MLP beside them, which every token takes
    dtype: Literal["fp32", "bf16"] = "fp32"
    tokenizer: Literal["bytes", "huggingface"] = "bytes"  # a token is a byte, or one of a tokenizer of your own
    end_of_document: int = 0
    sequence_length: int | None = None  # with which it was trained

    def as_json(self) -> dict[str, Any]:
        return {"model_type": "nsa_gpt", **asdict(self)}

    @classmethod
    def of_json(cls, raw: Any) -> "GPTConfig":
        """ValueError for what is no such configuration, and for keys that mean nothing here."""
        names = {field.name for field in fields(cls)}
        if not isinstance(raw, dict) or raw.get("model_type") != "nsa_gpt":
            kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(
                f"model_type is {kind!r}, but this model is 'nsa_gpt': others have other layers; give a folder that "
                f"nsa-dist export wrote of an NSA model, or make one of a Llama or Qwen 3 with nsa-dist convert"
            )
        values = {name: value for name, value in raw.items() if name != "model_type"}
        if unknown := sorted(values.keys() - names):
            raise ValueError(
                f"{', '.join(unknown)} is no key of this version, and what is not known cannot be honoured; export the "
                f"run again with this version, or take the version that wrote it"
            )
        kinds = ("bytes", "huggingface")
        if values.get("tokenizer", "bytes") not in kinds or values.get("dtype", "fp32") not in ("fp32", "bf16"):
            raise ValueError(
                f"tokenizer={values.get('tokenizer')!r} must be one of {', '.join(kinds)} and "
                f"dtype={values.get('dtype')!r} fp32 or bf16, which is what runs are trained with; export the run again"
            )
        try:
            config = cls(**{**values, "nsa": NSAConfig(**values["nsa"])})
            config.rotary_of(0)
        except (KeyError, TypeError) as error:
            raise ValueError(f"sizes are missing or are none ({error}); export the run again") from error
        if config.no_rope is not None and len(config.no_rope) != config.num_layers:
            raise ValueError(
                f"no_rope={config.no_rope} must have a number for each of {config.num_layers} layers, which says "
                f"whether it has no positions; export the run again"
            )
        if config.num_experts is not None:
            config._check_experts(config.num_experts)
        return config

    def _check_experts(self, num_experts: int) -> None:
        freq, topk = self.moe_layer_freq, self.moe_router_topk
        if (freq is not None and len(freq) != self.num_layers) or not 1 <= topk <= num_experts:
            raise ValueError(
                f"moe_layer_freq={freq} must have a number for each of {self.num_layers} layers, and "
                f"moe_router_topk={topk} be one of the {num_experts} experts at least and all at most; export the run "
                f"again"
            )

    def has_experts(self, layer: int) -> bool:
        """Of a layer, counted from 0."""
        freq = self.moe_layer_freq
        return self.num_experts is not None and (freq is None or bool(freq[layer]))

    def rotary_of(self, layer: int) -> Rotary:
        """How a layer, counted from 0, turns queries and keys. ValueError for a scaling that is none."""
        has_none = self.no_rope is not None and self.no_rope[layer]
        stretch, scaling = scaling_of(self.rope_scaling)
        return Rotary(self.rotary_base, 0.0 if has_none else self.rotary_percent, stretch, scaling)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


class GPT(nn.Module):
    """Embedding, `num_layers` blocks, norm, output; `forward` is training's, `prefill` and `decode` take a cache."""

    def __init__(self, config: GPTConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": config.torch_dtype}
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, **where)
        self.blocks = nn.ModuleList(Block(config, layer, where) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, **where)
        self.output = None
        if not config.tie_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **where)

    @property
    def layers(self) -> list["Block"]:
        return cast(list[Block], list(self.blocks))

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor | Sequence[int] | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """tokens [T], packed documents, or [B, T] -> logits [..., vocab]; rows: of these tokens [T] alone."""
        x = self.embedding(tokens)
        for block in self.layers:
            x = x + block.attention(block.attention_norm(x), cu_seqlens=cu_seqlens)
            x = x + block.mlp(block.mlp_norm(x))
        return self._logits(x if rows is None else x[rows])

    def make_cache(self, num_tokens: int, num_sequences: int = 1, **pages: Any) -> "ModelCache":
        """For `num_sequences` sequences at once, of `num_tokens` tokens each at most; pages as `NSALayer` takes it."""
        num_pages = num_sequences * -(-num_tokens // self.config.nsa.slc_block_len)
        return ModelCache(
            [block.attention.make_cache(num_pages, num_sequences, num_tokens, **pages) for block in self.layers]
        )

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        cache: "ModelCache",
        seqs: Sequence[int],
        cu_seqlens: Tensor | Sequence[int] | None = None,
        plan: ShardPlan | None = None,
        cp_group: dist.ProcessGroup | Comm | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The next chunk of each sequence, packed: tokens [T] -> logits [T, vocab], or those of `rows` alone.

        plan, cp_group      of a cache over ranks, as `nsa_prefill` takes them: tokens are `plan.shard(..., rank)`
        """
        x = self.embedding(tokens)
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = x + block.attention.prefill(block.attention_norm(x), layer_cache, seqs, cu_seqlens, plan, cp_group)
            x = x + block.mlp(block.mlp_norm(x))
        return self._logits(x if rows is None else x[rows])

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        cache: "ModelCache",
        seqs: Sequence[int],
        cp_group: dist.ProcessGroup | Comm | None = None,
    ) -> Tensor:
        """1 to 8 new tokens of each sequence: tokens [B, new] -> logits [B, new, vocab], over ranks the same on all."""
        x = self.embedding(tokens)
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = x + block.attention.decode(block.attention_norm(x), layer_cache, seqs, cp_group)
            x = x + block.mlp(block.mlp_norm(x))
        return self._logits(x)

    @torch.no_grad()
    def decode_step(
        self,
        tokens: Tensor,
        cache: "ModelCache",
        slots: Sequence[Tensor],
        cp_group: dist.ProcessGroup | Comm | None = None,
        *,
        with_phi: bool = True,
    ) -> Tensor:
        """`decode` as launches alone, which a CUDA graph can hold (`captured`): slots [B] of each layer's cache."""
        x = self.embedding(tokens)
        positions = next_positions(cache.layers[0], slots[0], tokens.shape[1])
        for block, layer_cache, layer_slots in zip(self.layers, cache.layers, slots, strict=True):
            attended = block.attention.decode_step(
                block.attention_norm(x), layer_cache, layer_slots, cp_group, with_phi=with_phi, positions=positions
            )
            x = x + attended
            x = x + block.mlp.in_line(block.mlp_norm(x))
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        weight = self.embedding.weight if self.output is None else self.output.weight
        return functional.linear(self.norm(x), weight)


class Block(nn.Module):
    """Attention and a gated MLP, each behind its norm."""

    def __init__(self, config: GPTConfig, layer: int, where: dict[str, Any]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.norm_eps, **where)
        self.attention = NSALayer(
            config.hidden_size, config.num_q_heads, config.num_kv_heads, config.head_dim, config.nsa,
            v_head_dim=config.v_head_dim, shared_kv=config.shared_kv, compression=config.compression,
            compress_before_rope=config.compress_before_rope, rotary=config.rotary_of(layer), qk_norm=config.qk_norm,
            norm_eps=config.norm_eps, gate_bias=config.gate_bias, **where,
        )  # fmt: skip
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps, **where)
        hidden, num_experts = config.hidden_size, config.num_experts
        self.mlp: GatedMLP | Experts
        if num_experts is not None and config.has_experts(layer):
            self.mlp = Experts(config, num_experts, where)
        else:
            self.mlp = GatedMLP(hidden, config.ffn_hidden_size, where)


class GatedMLP(nn.Module):
    """silu(gate) * up, from one projection [gate | up]."""

    def __init__(self, hidden_size: int, width: int, where: dict[str, Any]) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * width, bias=False, **where)
        self.down = nn.Linear(width, hidden_size, bias=False, **where)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x [..., hidden]; weight [..., 1] of what is between the projections, as Megatron weighs its experts."""
        gate, up = self.up(x).chunk(2, -1)
        inner = functional.silu(gate) * up
        return self.down(inner if weight is None else (inner * weight).to(x.dtype))

    def in_line(self, x: Tensor) -> Tensor:
        """`forward` as launches alone."""
        return self(x)


class Experts(nn.Module):
    """MLPs of which a router gives each token `moe_router_topk`, and one for all tokens beside them if there is one."""

    def __init__(self, config: GPTConfig, num_experts: int, where: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size or config.ffn_hidden_size
        shared = config.moe_shared_expert_intermediate_size
        self.topk, self.pre_softmax = config.moe_router_topk, config.moe_router_pre_softmax
        self.router = nn.Linear(hidden, num_experts, bias=False, **where)
        self.experts = nn.ModuleList(GatedMLP(hidden, width, where) for _ in range(num_experts))
        self.shared = None if shared is None else GatedMLP(hidden, shared, where)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden]. Each expert is given the tokens that take it, which the host waits for on a GPU."""
        flat = x.flatten(0, -2)
        weights, taken = self._route(flat)
        out = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        for number, expert in enumerate(self.experts):
            token, place = (taken == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token], weights[token, place, None]))
        return out.view(x.shape)

    def in_line(self, x: Tensor) -> Tensor:
        """`forward` as launches alone: every expert is given all tokens, and counts for those that take it."""
        flat = x.flatten(0, -2)
        weights, taken = self._route(flat)
        out = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        for number, expert in enumerate(self.experts):
            out = out + expert(flat, (weights * (taken == number)).sum(-1, keepdim=True))
        return out.view(x.shape)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> weights fp32 and experts int64, both [T, topk]."""
        logits = functional.linear(x.float(), self.router.weight.float())
        best, taken = (logits.softmax(-1) if self.pre_softmax else logits).topk(self.topk, -1)
        return (best if self.pre_softmax else best.softmax(-1)), taken


class ModelCache:
    """The caches of all layers, in which a sequence has one id."""

    def __init__(self, layers: Sequence[NSACache]) -> None:
        self.layers = list(layers)

    def new_sequence(self) -> int:
        return self._all("new_sequence")

    def fork(self, seq: int) -> int:
        return self._all("fork", seq)

    def truncate(self, seq: int, length: int) -> None:
        self._all("truncate", seq, length)

    def free(self, seq: int) -> None:
        self._all("free", seq)

    def length(self, seq: int) -> int:
        return self._all("length", seq)

    def num_bytes(self) -> int:
        return sum(layer.num_bytes() for layer in self.layers)

    def _all(self, method: str, *arguments: int) -> Any:
        answers = [getattr(layer, method)(*arguments) for layer in self.layers]
        assert len(set(answers)) == 1
        return answers[0]
