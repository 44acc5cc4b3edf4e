"""Native Sparse Attention one document, one query, one head at a time: the second, deliberately plain opinion.

It shares no code with `nsa_kernels.reference`: importance walks over every token of the overlap instead of using the
weights of eq. 9, and every softmax is written out.
"""

import torch
from torch import Tensor


def softmax_average(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.stack(scores).exp()
    return (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()


def mlp_block(block: Tensor, pos_emb: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """One block of one head, [l, D] -> [D], gelu in its tanh form written out."""
    x = sum((block[t] + pos_emb[t]) @ w1[t * block.shape[1] : (t + 1) * block.shape[1]] for t in range(len(block)))
    gelu = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return gelu @ w2


def importance(probabilities: list[Tensor], num_blocks: int, cfg) -> list[float]:
    """Eq. 9 by counting: token strides shared by compressed block i and selection block j."""
    result = []
    for j in range(num_blocks):
        total = 0.0
        for i, p in enumerate(probabilities):
            mine = set(range(i * cfg.cmp_stride, i * cfg.cmp_stride + cfg.cmp_block_len))
            block = set(range(j * cfg.slc_block_len, (j + 1) * cfg.slc_block_len))
            total += len(mine & block) / cfg.cmp_stride * float(p)
        result.append(total)
    return result


def choose(scores: list[float], own: int, cfg) -> list[int]:
    visible = list(range(own + 1))
    forced = [j for j in visible if j < cfg.num_init_blocks or j > own - cfg.num_local_blocks]
    others = sorted((j for j in visible if j not in forced), key=lambda j: (-scores[j], j))
    return sorted(forced + others[: cfg.num_slc_blocks - len(forced)])


def one_query(t: int, h: int, q: Tensor, kv, k_blocks, v_blocks, cfg, blocks: list[int], scale: float) -> list[Tensor]:
    """The three branch outputs of query t, head h of one document; `blocks` are the selected ones."""
    g = h // (q.shape[1] // kv.k_cmp.shape[1])
    seen = [i for i in range(len(k_blocks)) if i * cfg.cmp_stride + cfg.cmp_block_len - 1 <= t]
    selected = [s for j in blocks for s in range(j * cfg.slc_block_len, (j + 1) * cfg.slc_block_len) if s <= t]
    window = [s for s in range(t + 1) if t - s < cfg.window_len]
    out = []
    for keys, values, where in (
        (k_blocks, v_blocks, seen),
        (kv.k_slc, kv.v_slc, selected),
        (kv.k_win, kv.v_win, window),
    ):
        if not where:
            out.append(kv.v_cmp.new_zeros(kv.v_cmp.shape[-1]))
            continue
        scores = [scale * (q[t, h] * keys[s][g]).sum() for s in where]
        out.append(softmax_average(scores, [values[s][g] for s in where]))
    return out


def select_one(t: int, g: int, q: Tensor, k_blocks, num_kv_heads: int, cfg, scale: float) -> list[int]:
    group = q.shape[1] // num_kv_heads
    seen = [i for i in range(len(k_blocks)) if i * cfg.cmp_stride + cfg.cmp_block_len - 1 <= t]
    total = [torch.zeros((), dtype=torch.float64) for _ in seen]
    for h in range(g * group, (g + 1) * group):
        weights = [float(torch.exp(scale * (q[t, h] * k_blocks[i][g].detach()).sum())) for i in seen]
        total = [a + w / sum(weights) for a, w in zip(total, weights, strict=True)]
    own = t // cfg.slc_block_len
    return choose(importance(total, own + 1, cfg), own, cfg)


def document(q: Tensor, kv, gates: Tensor, cfg, phi_k, phi_v, scale: float) -> tuple[Tensor, Tensor]:
    """One document: q [T, Hq, Dk] -> out [T, Hq, Dv], block_indices [T, Hkv, n] counted from its own first block."""
    length, num_kv_heads = q.shape[0], kv.k_cmp.shape[1]
    starts = [s for s in range(0, length, cfg.cmp_stride) if s + cfg.cmp_block_len <= length]
    k_blocks, v_blocks = (
        [torch.stack([phi(x[s : s + cfg.cmp_block_len, g], g) for g in range(num_kv_heads)]) for s in starts]
        for phi, x in ((phi_k, kv.k_cmp), (phi_v, kv.v_cmp))
    )
    indices = torch.full((length, num_kv_heads, cfg.num_slc_blocks), -1, dtype=torch.int32)
    rows = []
    for t in range(length):
        chosen = [select_one(t, g, q.detach(), k_blocks, num_kv_heads, cfg, scale) for g in range(num_kv_heads)]
        for g, blocks in enumerate(chosen):
            indices[t, g, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        heads = []
        for h in range(q.shape[1]):
            branches = one_query(t, h, q, kv, k_blocks, v_blocks, cfg, chosen[h * num_kv_heads // q.shape[1]], scale)
            heads.append(sum(gates[t, h, b] * out for b, out in enumerate(branches)))
        rows.append(torch.stack(heads))
    return torch.stack(rows), indices


def attention(q: Tensor, kv, gates: Tensor, cfg, phi_k, phi_v, lengths: list[int], scale: float):
    """A pack of documents; global block ids count each document's blocks from the end of the one before."""
    outs, indices = [], []
    start = first_block = 0
    for length in lengths:
        rows = slice(start, start + length)
        out, ids = document(q[rows], type(kv)(*(x[rows] for x in kv)), gates[rows], cfg, phi_k, phi_v, scale)
        outs.append(out)
        indices.append(torch.where(ids >= 0, ids + first_block, ids))
        start += length
        first_block += -(-length // cfg.slc_block_len)
    return torch.cat(outs), torch.cat(indices)
