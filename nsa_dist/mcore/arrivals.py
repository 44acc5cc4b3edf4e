"""Masks and rotary angles that a model hands to its layers: the layer has its own, so these must say the same.

Each tensor is looked at once, when it first comes; on a GPU the host waits for that look. A model that passes none
(`create_attention_mask=False` in its dataset, `position_embedding_type="none"`) waits for nothing.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nsa_dist.cp.plan import ShardPlan
from nsa_dist.rope import frequencies
from nsa_dist.rope_scaling import Rotary

_ROWS = 1024  # of a mask that are compared at once


class Arrivals:
    """What was looked at and found right. One instance serves all layers."""

    def __init__(self) -> None:
        self._seen: list[tuple[StorageWeakRef, tuple]] = []

    def __deepcopy__(self, memo: dict) -> "Arrivals":
        return Arrivals()  # a weak reference to memory has one owner

    def check_mask(self, mask: Tensor | None, plan: ShardPlan, given: ShardPlan, rank: int) -> None:
        """ValueError for a mask that is not causal over the sequence, or for a pack over its documents.

        As Megatron has it: bool, true where a key is not seen, [..., local tokens, all tokens], rows cut as `given`.
        """
        if mask is None or self._is_known(mask, ("mask", given, plan.cu_seqlens)):
            return
        tokens = plan.num_tokens
        local = tokens // plan.cp_size
        wrong = f"attention_mask of {mask.dtype} and shape {tuple(mask.shape)}"
        if mask.dtype != torch.bool or mask.dim() < 2 or tuple(mask.shape[-2:]) != (local, tokens):
            reason = f"is not a bool mask [..., {local}, {tokens}] of the batch"
        elif not _is_causal(mask, plan, given, rank):
            reason = "does not hide exactly what comes later"
            if plan.num_documents > 1:
                reason += ", nor what is in another document as well"
        else:
            self._remember(mask, ("mask", given, plan.cu_seqlens))
            return
        raise ValueError(
            f"{wrong} {reason}, but NSA reads no mask: a token sees the blocks of its own document before it; pass "
            f"attention_mask=None, and packed_seq_params with the bounds of the documents to keep them apart "
            f"(Megatron-LM: no --reset-attention-mask, but --dataloader-inter-document-masking or --sft)"
        )

    def check_chunk_mask(self, mask: Tensor | None, tokens: int, offset: int) -> None:
        """ValueError for a mask that is not causal, of `tokens` new tokens behind `offset` of a cache.

        As Megatron has it: bool, true where a key is not seen, [..., tokens, offset + tokens].
        """
        if mask is None or self._is_known(mask, ("chunk", offset)):
            return
        if mask.dtype == torch.bool and tuple(mask.shape[-2:]) == (tokens, offset + tokens):
            later = torch.ones(tokens, offset + tokens, dtype=torch.bool, device=mask.device).triu(offset + 1)
            if bool((mask == later).all()):
                self._remember(mask, ("chunk", offset))
                return
        raise ValueError(
            f"attention_mask of {mask.dtype} and shape {tuple(mask.shape)} is no causal mask [..., {tokens}, "
            f"{offset + tokens}] of {tokens} tokens behind {offset}, but NSA reads no mask: a token sees what is "
            f"before it; pass attention_mask=None, and rows without padding"
        )

    def check_rotary(self, angles: Tensor | None, head_dim: int, rotary: Rotary) -> None:
        """ValueError for rotary angles that are not those of `rotary` over a head of that width.

        As Megatron has them: [tokens, 1, 1, turned], both halves alike, whatever tokens they are of.
        """
        if angles is None or (isinstance(angles, Tensor) and self._is_known(angles, (head_dim, rotary))):
            return
        if isinstance(angles, Tensor) and _are_of(angles, head_dim, rotary):
            self._remember(angles, (head_dim, rotary))
            return
        raise ValueError(
            f"rotary_pos_emb is not that of this layer, which turns {rotary.turned(head_dim)} of {head_dim} numbers "
            f"of a head by {rotary} and nothing else: the model has another base, percent, scaling or interpolation; "
            f"set nsa_rotary_base to the model's rotary_base, rotary_percent and the rest as the model has them, and "
            f"pass position_embedding_type='none' to the model"
        )

    def _is_known(self, x: Tensor, of: tuple) -> bool:
        self._seen = [entry for entry in self._seen if not entry[0].expired()]
        key = _key(x, of)
        return key is not None and any(ref.cdata == x.untyped_storage()._cdata and k == key for ref, k in self._seen)

    def _remember(self, x: Tensor, of: tuple) -> None:
        key = _key(x, of)
        if key is not None:
            self._seen.append((StorageWeakRef(x.untyped_storage()), key))


def _key(x: Tensor, of: tuple) -> tuple | None:
    """What tells a tensor from others of the same storage, and from itself before it was written to.

    Not its identity: recomputation hands on the same memory as another tensor. None in inference mode, where nothing
    tells.
    """
    return None if x.is_inference() else (x._version, x.storage_offset(), tuple(x.shape), x.stride(), of)


def _is_causal(mask: Tensor, plan: ShardPlan, given: ShardPlan, rank: int) -> bool:
    position = torch.arange(plan.num_tokens) if plan.cp_size == 1 else given.positions(rank)
    bounds = torch.tensor(plan.cu_seqlens)
    start = bounds[torch.searchsorted(bounds, position, right=True) - 1]
    position, start = position.to(mask.device)[:, None], start.to(mask.device)[:, None]
    key = torch.arange(plan.num_tokens, device=mask.device)
    over_all, over_documents = [], []
    for first in range(0, len(position), _ROWS):
        rows = slice(first, first + _ROWS)
        later, other = key > position[rows], key < start[rows]
        over_all.append((mask[..., rows, :] == later).all())
        over_documents.append((mask[..., rows, :] == (later | other)).all())
    return bool(torch.stack(over_all).all() | torch.stack(over_documents).all())


def _are_of(angles: Tensor, head_dim: int, rotary: Rotary) -> bool:
    angles = angles.detach().to(torch.float64).flatten(0, -2)
    frequency = frequencies(rotary, head_dim, angles.device)
    if angles.shape[-1] != 2 * len(frequency) or not len(frequency):
        return False
    position = angles[:, :1] / frequency[0]
    expected = torch.cat([position * frequency, position * frequency], -1)
    whole = torch.isclose(position, position.round(), rtol=1e-5, atol=1e-4).all()
    return bool(whole & torch.isclose(angles, expected, rtol=1e-5, atol=1e-6).all())
