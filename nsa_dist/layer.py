"""The attention layer as a plain `nn.Module`: projections, gates, phi and rotary positions, for anyone's model.

It trains as it is, over data-parallel ranks with whatever wraps modules, over context-parallel ones with a group and a
plan; and it appends to a cache. Needs torch and nsa_kernels; no Megatron, no Ray.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_dist.attention import nsa_attention
from nsa_dist.branches import BranchKV
from nsa_dist.compress import MeanCompress, TurnedCompressMLP
from nsa_dist.config import NSAConfig
from nsa_dist.cp.comm import Comm
from nsa_dist.cp.device import put_on
from nsa_dist.cp.options import FetchOptions
from nsa_dist.cp.plan import ShardPlan, as_bounds, runs
from nsa_dist.inference import over_ranks
from nsa_dist.inference.attend import nsa_decode, nsa_prefill
from nsa_dist.inference.cache import NSACache
from nsa_dist.inference.decode import EMPTY_SLOT, decode_step
from nsa_dist.operators import default_ops
from nsa_dist.rope import Positions
from nsa_dist.rope_scaling import Rotary

QKNorm = Literal["rms", "layer", "l2"]
PLAIN = Rotary()


class NSALayer(nn.Module):
    """Self-attention of a transformer layer by Native Sparse Attention, between its norm and its residual.

    hidden_size, num_q_heads, num_kv_heads, head_dim
    cfg                     sizes of the branches
    v_head_dim              of values; None: head_dim
    shared_kv               one key and value for the three branches instead of one each
    compression             phi: "mlp", one for keys and one for values, or "mean", without parameters
    compress_before_rope    and turn the compressed key at its block's first position; else compress turned keys
    rotary                  how queries and keys are turned by their positions; `Rotary(percent=0)`: not at all
    rotary_base             short for rotary=Rotary(rotary_base)
    qk_norm                 of queries, and of the keys of each branch, before they are compressed or turned: "rms",
                            "layer", or "l2", an RMS norm without weights; None: none
    norm_eps                of those norms
    bias                    of the two projections
    gate_bias               of the gates' logits, one number a head and branch, 0 at first

    One `qkv` projects everything, interleaved by key/value head, with G = query heads per key/value head:

        [ q: G * Dk | k_cmp v_cmp k_slc v_slc k_win v_win: 3 * (Dk + Dv), or one pair if shared | gate: 3 * G ]

    as `nsa_dist.mcore.NSASelfAttention` does, whose weights it takes. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cfg: NSAConfig | None = None,
        *,
        v_head_dim: int | None = None,
        shared_kv: bool = False,
        compression: Literal["mlp", "mean"] = "mlp",
        compress_before_rope: bool = True,
        rotary: Rotary = PLAIN,
        rotary_base: float | None = None,
        qk_norm: QKNorm | None = None,
        norm_eps: float = 1e-5,
        bias: bool = False,
        gate_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_q_heads, num_kv_heads, head_dim, compression)
        if rotary_base is not None:
            if rotary != PLAIN:
                raise ValueError(
                    f"rotary_base={rotary_base} and rotary={rotary} are both given, and each has a base; leave "
                    f"rotary_base out"
                )
            rotary = Rotary(rotary_base)
        self.cfg = cfg or NSAConfig()
        self.num_q_heads, self.num_kv_heads = num_q_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim or head_dim
        self.shared_kv, self.rotary, self.compress_before_rope = shared_kv, rotary, compress_before_rope
        group, pair = num_q_heads // num_kv_heads, head_dim + self.v_head_dim
        self.group_widths = [group * head_dim, pair if shared_kv else 3 * pair, group * 3]
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(hidden_size, num_kv_heads * sum(self.group_widths), bias=bias, **where)
        self.proj = nn.Linear(num_q_heads * self.v_head_dim, hidden_size, bias=bias, **where)
        self.gate = GateBias(num_q_heads, where) if gate_bias else nn.Identity()
        self.q_norm = _norm(qk_norm, head_dim, norm_eps, where)
        names = ["shared"] if shared_kv else ["cmp", "slc", "win"]
        self.k_norm = nn.ModuleDict({name: _norm(qk_norm, head_dim, norm_eps, where) for name in names})
        turned = rotary if compress_before_rope else None
        self.compress_k = self._compressor(compression, head_dim, turned, where)
        self.compress_v = self._compressor(compression, self.v_head_dim, None, where)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        plan: ShardPlan | None = None,
        cp_group: dist.ProcessGroup | Comm | None = None,
        fetch: FetchOptions | None = None,
        ops: ModuleType | None = None,
    ) -> Tensor:
        """x [T, hidden], packed documents, or [B, T, hidden], B documents -> the same shape.

        cu_seqlens          of a pack; None: one document, or the plan's
        plan, cp_group      both given: x is `plan.shard(..., rank)` of this rank
        fetch, ops          as `nsa_attention` takes them
        """
        if x.dim() == 3:
            if cu_seqlens is not None or plan is not None:
                raise ValueError(
                    f"x {tuple(x.shape)} is a batch, and cu_seqlens or plan was given, which bound documents of one "
                    f"packed row; pass x.flatten(0, 1) and the bounds of its documents"
                )
            cu_seqlens = range(0, x.shape[0] * x.shape[1] + 1, x.shape[1]) if x.shape[1] else [0]
            return self(x.flatten(0, 1), cu_seqlens=cu_seqlens, fetch=fetch, ops=ops).view(x.shape)
        bounds = None
        if plan is None:
            bounds = torch.tensor(as_bounds([0, len(x)] if cu_seqlens is None else cu_seqlens), dtype=torch.int32)
            position = runs(torch.zeros(len(bounds) - 1, dtype=torch.int64), bounds.diff().long())
        else:
            position = plan.document_positions(cp_group.rank if isinstance(cp_group, Comm) else Comm(cp_group).rank)
        q, kv, gates = self.project(x, put_on(x.device, position))
        out = nsa_attention(
            q, kv, gates, self.cfg, compress_k=self.compress_k, compress_v=self.compress_v, cu_seqlens=bounds,
            plan=plan, cp_group=cp_group, fetch=fetch, ops=ops,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return self.proj(out.flatten(1))

    def make_cache(self, num_pages: int, max_sequences: int = 0, max_tokens: int = 0, **pages: Any) -> NSACache:
        """For this layer, of its weights' dtype and device; `NSACache` says what pages are.

        pages       page_dtype, k_scale, v_scale, cmp_placement
        """
        weight = self.qkv.weight
        return NSACache(
            self.cfg, self.num_kv_heads, self.head_dim, self.v_head_dim, num_pages, dtype=weight.dtype,
            device=weight.device, compress_k=self.compress_k, compress_v=self.compress_v, max_sequences=max_sequences,
            max_tokens=max_tokens, **pages,
        )  # fmt: skip

    @torch.no_grad()
    def prefill(
        self,
        x: Tensor,
        cache: NSACache,
        seqs: Sequence[int],
        cu_seqlens: Tensor | Sequence[int] | None = None,
        plan: ShardPlan | None = None,
        cp_group: dist.ProcessGroup | Comm | None = None,
    ) -> Tensor:
        """The next chunk of each sequence, packed: x [T, hidden] -> [T, hidden]. As `nsa_prefill`."""
        start = torch.tensor([cache.length(seq) for seq in seqs], dtype=torch.int64)
        if plan is None:
            cu_seqlens = torch.tensor(as_bounds([0, len(x)] if cu_seqlens is None else cu_seqlens), dtype=torch.int64)
            fits = len(start) == len(cu_seqlens) - 1  # else nsa_prefill says what is wrong
            position = runs(start, cu_seqlens.diff()) if fits else torch.zeros(len(x), dtype=torch.int64)
        else:
            rank = cp_group.rank if isinstance(cp_group, Comm) else Comm(cp_group).rank
            position = plan.document_positions(rank)
            if len(start) == plan.num_documents:
                document = plan.local_blocks(rank).document.repeat_interleave(plan.block_len)
                position = position + start[document]
        projected = self.project(x, put_on(x.device, position))
        out = nsa_prefill(*projected, cache, seqs, cu_seqlens=cu_seqlens, plan=plan, cp_group=cp_group)
        assert isinstance(out, Tensor)
        return self.proj(out.flatten(1))

    @torch.no_grad()
    def decode(
        self, x: Tensor, cache: NSACache, seqs: Sequence[int], cp_group: dist.ProcessGroup | Comm | None = None
    ) -> Tensor:
        """1 to 8 new tokens of each sequence: x [B, new, hidden] -> [B, new, hidden]. As `nsa_decode`."""
        new = x.shape[1]
        start = torch.tensor([0 if seq == EMPTY_SLOT else cache.length(seq) for seq in seqs], dtype=torch.int64)
        position = (start[:, None] + torch.arange(new)).flatten()
        q, kv, gates = self.project(x.flatten(0, 1), put_on(x.device, position))
        q, gates, *pairs = (y.unflatten(0, (len(seqs), new)) for y in (q, gates, *kv))
        out = nsa_decode(q, BranchKV(*pairs), gates, cache, seqs, cp_group=cp_group)
        assert isinstance(out, Tensor)
        return self.proj(out.flatten(2))

    @torch.no_grad()
    def decode_step(
        self,
        x: Tensor,
        cache: NSACache,
        slots: Tensor,
        cp_group: dist.ProcessGroup | Comm | None = None,
        *,
        with_phi: bool = True,
        positions: Positions | None = None,
    ) -> Tensor:
        """`decode` as launches alone, of `nsa_dist.inference.decode`.

        positions       `next_positions` of any layer before the first has appended; None: of this one
        """
        batch, new = x.shape[:2]
        positions = next_positions(cache, slots, new) if positions is None else positions
        q, kv, gates = self.project(x.flatten(0, 1), positions)
        q, gates, *pairs = (y.unflatten(0, (batch, new)) for y in (q, gates, *kv))
        comm, new_kv = cp_group if isinstance(cp_group, Comm) else Comm(cp_group), BranchKV(*pairs)
        if comm.size > 1:
            out, _ = over_ranks.decode_step(q, new_kv, gates, cache, slots, comm, default_ops(q), with_phi=with_phi)
        else:
            out, _ = decode_step(q, new_kv, gates, cache, slots, default_ops(q), with_phi=with_phi)
        return self.proj(out.flatten(2))

    def project(self, x: Tensor, position: Tensor | Positions) -> tuple[Tensor, BranchKV, Tensor]:
        """x [T, hidden] and positions in documents [T] -> what `nsa_attention` takes: q, kv, gates."""
        if isinstance(position, Tensor):
            position = Positions(position.to(x.device))
        if x.dim() != 2 or len(x) != len(position):
            raise ValueError(
                f"x {tuple(x.shape)} must be [T, hidden] with T = {len(position)}, as cu_seqlens or plan says; pass "
                f"that many rows"
            )
        mixed = self.qkv(x).unflatten(-1, (self.num_kv_heads, sum(self.group_widths)))
        q, kv, logits = mixed.split(self.group_widths, -1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(1).unflatten(1, (-1, 3))
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim)).flatten(1, 2))
        pairs = list(kv.split([self.head_dim, self.v_head_dim] * len(self.k_norm), -1))
        pairs[::2] = [norm(k) for norm, k in zip(self.k_norm.values(), pairs[::2], strict=True)]
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = pairs * 3 if self.shared_kv else pairs
        turning = [q, k_slc] if self.shared_kv else [q, k_slc, k_win]
        if not self.shared_kv and not self.compress_before_rope:
            turning.append(k_cmp)
        together = torch.cat(turning, 1)
        turns = position.turns(self.rotary, self.head_dim, together.dtype)
        turned = turns.of(together).split([y.shape[1] for y in turning], 1)
        q, k_slc = turned[:2]
        k_win = k_slc if self.shared_kv else turned[2]
        if not self.compress_before_rope:
            k_cmp = turned[-1]
        return q, BranchKV(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), torch.sigmoid(self.gate(logits))

    def _compressor(self, kind: str, head_dim: int, rotary: Rotary | None, where: dict[str, Any]) -> nn.Module:
        block_len = self.cfg.cmp_block_len
        if kind == "mean":
            return MeanCompress(block_len, rotary)
        return TurnedCompressMLP(self.num_kv_heads, head_dim, block_len, rotary=rotary, **where)


def next_positions(cache: NSACache, slots: Tensor, new: int) -> Positions:
    """Of `new` more tokens of each sequence, read from the cache's tables on the device."""
    start = cache.tables.lengths.index_select(0, slots.clamp(min=0))
    return Positions((start[:, None] + torch.arange(new, device=slots.device)).flatten())


class GateBias(nn.Module):
    """Adds `bias` [Hq * 3] to logits [T, Hq, 3]."""

    def __init__(self, num_q_heads: int, where: dict[str, Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3 * num_q_heads, **where))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias.view(-1, 3)


def _norm(kind: QKNorm | None, head_dim: int, eps: float, where: dict[str, Any]) -> nn.Module:
    if kind not in (None, *get_args(QKNorm)):
        raise ValueError(
            f"qk_norm={kind!r} must be one of {', '.join(get_args(QKNorm))}, or None for none, as those are the norms "
            f"there are; take one"
        )
    if kind is None:
        return nn.Identity()
    if kind == "layer":
        return nn.LayerNorm(head_dim, eps, **where)
    return nn.RMSNorm(head_dim, eps, elementwise_affine=kind == "rms", **where)


def _check_sizes(num_q_heads: int, num_kv_heads: int, head_dim: int, compression: str) -> None:
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads={num_q_heads} must be a multiple of num_kv_heads={num_kv_heads}, as each of those serves "
            f"equally many query heads; choose a divisor of {num_q_heads}"
        )
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"head_dim={head_dim} must be even, because rotary positions turn pairs of it; take {head_dim + 1}"
        )
    if compression not in ("mlp", "mean"):
        raise ValueError(
            f"compression={compression!r} must be 'mlp' or 'mean', as those are the phi there are; take one"
        )
