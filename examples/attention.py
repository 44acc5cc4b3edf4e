"""Native Sparse Attention by itself: one differentiable call on a pack of two documents. On a GPU, or on a CPU.

python examples/attention.py
"""

import torch

from nsa_dist import BranchKV, NSAConfig, nsa_attention
from nsa_dist.compress import CompressMLP

torch.manual_seed(0)
on_gpu = torch.cuda.is_available()
make = {"device": "cuda" if on_gpu else "cpu", "dtype": torch.bfloat16 if on_gpu else torch.float32}

# Documents of 3,000 and 1,096 tokens, one behind the other: cu_seqlens says where each begins and the last ends.
# 8 query heads share 2 key/value heads. There is no batch dimension: a batch is a pack of its sequences.
T, Hq, Hkv, D = 4096, 8, 2, 64
cu_seqlens = torch.tensor([0, 3000, 4096], dtype=torch.int32)
cfg = NSAConfig(num_slc_blocks=8, window_len=256)  # the other sizes are the paper's

# In a model these come from linear layers: queries, and keys and values of each of the three branches (q, k_slc and
# k_win already turned by RoPE). The gates are sigmoids: how much of each branch a token's head takes.
q = torch.randn(T, Hq, D, requires_grad=True, **make)
kv = BranchKV(*(torch.randn(T, Hkv, D, requires_grad=True, **make) for _ in range(6)))
gates = torch.rand(T, Hq, 3, requires_grad=True, **make)

# phi makes one key, or value, of each block of 32 tokens. Leave both out to take the mean instead.
phi_k, phi_v = (CompressMLP(Hkv, D, cfg.cmp_block_len, **make) for _ in range(2))

out, block_indices = nsa_attention(
    q, kv, gates, cfg, compress_k=phi_k, compress_v=phi_v, cu_seqlens=cu_seqlens, return_block_indices=True
)
out.float().square().mean().backward()
print(f"out {tuple(out.shape)} {out.dtype} on {out.device}; gradients of q, K/V, gates and phi are there:")
print("  ", {name: f"{x.grad.float().norm():.1e}" for name, x in (("q", q), ("k_slc", kv.k_slc), ("phi_k", phi_k.w1))})

# What a query saw: the last token of the first document, first key/value head.
t = 2999
blocks = [block for block in block_indices[t, 0].tolist() if block >= 0]
print(f"\nToken {t} chose the blocks {blocks} of {cfg.slc_block_len} tokens: the first, its own and the one before")
print("always, the others because its compressed attention weighs them most.")
print(f"Blocks of the second document begin at {-(-3000 // cfg.slc_block_len)}: no query of the first sees them.")


def keys_seen(position: int, sizes: NSAConfig) -> int:
    """At most so many keys does the query at this position attend to, in all three branches."""
    compressed = sizes.num_cmp_blocks(position + 1)
    return compressed + sizes.num_slc_blocks * sizes.slc_block_len + sizes.window_len


print("\nKeys that one query attends to, against dense attention:")
for position, sizes in ((t, cfg), (65_535, NSAConfig()), (1_048_575, NSAConfig())):
    print(f"  token {position:9,}: {keys_seen(position, sizes):6,} of {position + 1:9,}")
