"""What a `PackedSeqParams` says about its documents, read once, and whether it still says the same."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_dist.cp.device import CopyToHost
from nsa_dist.mcore.config import NSATransformerConfig

PackOrder = Literal["sequence", "documents"]
_NAMES = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


class PackReading:
    """The bounds that a pack held when this was made.

    On a GPU they are on their way to the host, which waits for them when it asks for `bounds`. `holds` then goes by the
    tensors and their version counters, which every write of PyTorch's raises, and waits for nothing; it does not see
    what is written behind them there, through `.data` or DLPack. On a CPU, and for tensors made in inference mode,
    which have no counter, it compares values. `claimed` bounds are taken until `holds` finds whether they were these.

    Raises ValueError for a pack without bounds, of another format than "thd", or bounds that are not int32 or int64 of
    one dimension ([1, n] is taken for [n]).
    """

    def __init__(self, packed: PackedSeqParams, claimed: tuple[int, ...] | None = None) -> None:
        self._tensors = _tensors(packed)
        _check_form(packed, self._tensors)
        self._versions = [_version(x) for x in self._tensors]
        self._copies = [None if x is None else CopyToHost(x if x.is_cuda else x.clone()) for x in self._tensors]
        self._claimed = claimed

    def holds(self, packed: PackedSeqParams) -> bool:
        """Whether the pack has the same tensors with the same values. ValueError if they are not what was claimed."""
        if self._claimed is not None:
            claimed, self._claimed = self._claimed, None
            if claimed != self._read:
                raise ValueError(
                    f"prepare_pack was given cu_seqlens={_short(claimed)} for a pack whose bounds are "
                    f"{_short(self._read)}, so its plan is another batch's; pass the values of its own cu_seqlens_q, "
                    f"or cu_seqlens_q_padded if it has them"
                )
        return all(map(_is_unchanged, _tensors(packed), self._tensors, self._versions, self._copies))

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where documents begin and the last one ends, padding counted, empty ones left out.

        ValueError if keys and values have other documents than queries, or padded bounds do not hold the others.
        """
        return self._read if self._claimed is None else self._claimed

    @cached_property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each document of `bounds` without its padding; None where the pack says nothing of padding."""
        q, _, padded, _ = self._copies
        if q is None or padded is None:
            return None
        sizes = [c.wait().flatten().diff().tolist() for c in (q, padded)]
        return tuple(length for length, room in zip(*sizes, strict=True) if room)

    @cached_property
    def _read(self) -> tuple[int, ...]:
        q, kv, q_padded, kv_padded = (None if c is None else c.wait().flatten().tolist() for c in self._copies)
        for name, of_kv, of_q in (("cu_seqlens_kv", kv, q), ("cu_seqlens_kv_padded", kv_padded, q_padded)):
            if of_kv is not None and of_kv != of_q:
                raise ValueError(
                    f"packed_seq_params.{name} is {_short(of_kv)} where {name.replace('_kv', '_q')} is {_short(of_q)}, "
                    f"but in self-attention keys and queries are of the same documents; pass the same tensor for both"
                )
        if q_padded is not None and q is not None and not _fits(q, q_padded):
            raise ValueError(
                f"packed_seq_params.cu_seqlens_q_padded={_short(q_padded)} must have as many documents as "
                f"cu_seqlens_q={_short(q)}, none of them shorter, as it says where those stand with their padding; "
                f"pass the bounds that the batch was padded to, or leave cu_seqlens_q_padded out"
            )
        return document_bounds(q_padded or q or [])


def document_bounds(cu_seqlens: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Without empty documents. ValueError if they do not start at 0 or decrease.

    >>> document_bounds([0, 3, 3, 5])
    (0, 3, 5)
    """
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = cu_seqlens.flatten().tolist()
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or any(b < a for a, b in pairwise(cu_seqlens)) or not cu_seqlens[-1]:
        raise ValueError(
            f"packed_seq_params has cu_seqlens={_short(cu_seqlens)}, which must start at 0, never decrease and end at "
            f"the number of tokens, as they bound the documents of a pack; for one document pass [0, num_tokens]"
        )
    return (0, *(b for a, b in pairwise(cu_seqlens) if b > a))


def pack_order(config: NSATransformerConfig, packed: PackedSeqParams) -> PackOrder:
    """In which order the batch of a pack was cut over context-parallel ranks.

    "documents"     each document is a zigzag of its own: `get_thd_batch_on_this_cp_rank` of Megatron-core 0.16, from
                    0.18 on `get_batch_on_this_cp_rank` for batches with `cu_seqlens`
    "sequence"      the whole row is one zigzag, wherever documents end: the latter function with
                    `use_per_sequence_balancing=True`, which is `--dataloader-inter-document-masking` without `--sft`

    `config.nsa_pack_order` decides, else those two arguments if the config has them from Megatron-LM, else "documents".
    ValueError where Megatron-LM made the pack (0.19 notes `tokens_per_sample` in it) but nothing says which it was.
    """
    if config.nsa_pack_order is not None:
        return config.nsa_pack_order
    if config.dataloader_inter_document_masking and not config.sft:
        return "sequence"
    padded = getattr(packed, "cu_seqlens_q_padded", None)
    if getattr(packed, "tokens_per_sample", None) is not None and padded is None and not config.sft:
        raise ValueError(
            "packed_seq_params comes from Megatron-LM, which cuts packs over context-parallel ranks in two orders, and "
            "nothing in it says which; tokens in the wrong one would be silently scrambled; build the config with "
            "core_transformer_config_from_args(args, NSATransformerConfig), or set nsa_pack_order='sequence' for "
            "--dataloader-inter-document-masking, 'documents' for --sft"
        )
    return "documents"


def _tensors(packed: PackedSeqParams) -> list[Tensor | None]:
    return [getattr(packed, name, None) for name in _NAMES]


def _version(x: Tensor | None) -> int | None:
    return None if x is None or x.is_inference() else x._version


def _is_unchanged(x: Tensor | None, then: Tensor | None, version: int | None, copy: CopyToHost | None) -> bool:
    if x is not then or _version(x) != version:
        return False
    if x is None or copy is None or (x.is_cuda and version is not None):  # a version speaks without the host's looking
        return True
    return torch.equal(x.cpu(), copy.wait())


def _check_form(packed: PackedSeqParams, tensors: list[Tensor | None]) -> None:
    if packed.qkv_format not in (None, "thd"):
        raise ValueError(
            f"packed_seq_params.qkv_format={packed.qkv_format!r} is not 'thd', the format of packed documents; "
            f"set qkv_format='thd', or pass packed_seq_params=None for a batch of whole sequences"
        )
    if tensors[0] is None and tensors[2] is None:
        raise ValueError(
            "packed_seq_params has neither cu_seqlens_q nor cu_seqlens_q_padded, so where its documents end is "
            "unknown; set cu_seqlens_q to their int32 bounds [0, ..., num_tokens], or pass packed_seq_params=None"
        )
    for name, x in zip(_NAMES, tensors, strict=True):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"packed_seq_params.{name} is a {kind}, but bounds of documents are whole numbers in a tensor; "
                f"pass torch.tensor([0, ..., num_tokens], dtype=torch.int32)"
            )
        if x.dim() != 1 and not (x.dim() == 2 and x.shape[0] == 1):
            raise ValueError(
                f"packed_seq_params.{name} has shape {tuple(x.shape)}, but a pack is one row of tokens with bounds of "
                f"shape [num_docs + 1]; put the samples into one row and their bounds behind each other, as "
                f"megatron.core.utils.flatten_batch_for_packed_sequences does"
            )


def _fits(bounds: list[int], padded: list[int]) -> bool:
    return len(bounds) == len(padded) and all(
        b - a <= d - c for (a, b), (c, d) in zip(pairwise(bounds), pairwise(padded), strict=True)
    )


def _short(bounds: Sequence[int] | None) -> str:
    return "None" if bounds is None else f"{list(bounds[:6])}"[:-1] + (", ...]" if len(bounds) > 6 else "]")
