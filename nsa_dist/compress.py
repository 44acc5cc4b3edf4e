"""The learnable block compression phi (arXiv 2502.11089, eq. 7)."""

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from nsa_kernels import reference


class CompressMLP(nn.Module):
    """An MLP over the concatenated block, its intra-block position embedding added first; each kv head its own.

        y[i, h] = gelu(vec(x[block i, h] + pos_emb[h]) @ w1[h]) @ w2[h]

    `forward` takes what `nsa_attention` hands to any phi, blocks [M, l, Hkv, D] and their in-document starts [M]. It
    can also take rows in place (`block_rows`), so that blocks, which overlap, need not be copied out first.
    """

    takes_rows = True  # nsa_attention may pass rows and block_rows instead of blocks

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        block_len: int,
        hidden_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = head_dim if hidden_dim is None else hidden_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_kv_heads, *shape, device=device, dtype=dtype))

        self.pos_emb = empty(block_len, head_dim)
        self.w1 = empty(block_len * head_dim, hidden_dim)
        self.w2 = empty(hidden_dim, head_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Keep the variance of what passes through: fan-in scaling, a small position embedding."""
        self.pos_emb.normal_(std=0.02)
        self.w1.normal_(std=1 / math.sqrt(self.w1.shape[1]))
        self.w2.normal_(std=1 / math.sqrt(self.w2.shape[1]))

    def forward(
        self,
        x: Tensor,
        block_start: Tensor,
        block_rows: Tensor | None = None,
        ops: ModuleType = reference,
    ) -> Tensor:
        """[M, l, Hkv, D] (or, with block_rows [M], rows [R, Hkv, D]) -> [M, Hkv, D]."""
        if block_rows is None:
            num_blocks, block_len = x.shape[:2]
            block_rows = torch.arange(num_blocks, device=x.device, dtype=torch.int32) * block_len
            x = x.flatten(0, 1)
        return ops.compress_mlp(x, block_rows, self.pos_emb, self.w1, self.w2)

    def mlp_weights(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(pos_emb, w1, w2) if a call does no more than `ops.compress_mlp` of them: two such phis run together."""
        hooks = (self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks)
        if type(self).forward is not CompressMLP.forward or any(hooks):
            return None
        return self.pos_emb, self.w1, self.w2
