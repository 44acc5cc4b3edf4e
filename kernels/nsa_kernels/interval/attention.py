"""Gradients of compressed attention: one kernel that owns queries (dQ), one that owns keys (dK, dV). No atomics.

    P = exp(S - lse)     dP = dO V^T     delta = rowsum(dO * O) - dlse     dS = gate * P * (dP - delta)
    dQ = scale * dS K    dK = scale * dS^T Q    dV = (gate * P)^T dO

`gate` is there because the layer's output is sum_b gate_b * out_b: every branch takes the layer's dO and the rows' own
gate, so that no gate_b * dO is ever written. It may be negative, or None for 1.

Shapes      as in cmp_attention; grad_out [T, Hq, Dv], strides as q (else copied);
            gate and delta [T, Hq], any strides, delta of `out` before the gate
Numerics    fp32 accumulation; P and dS enter the tensor cores in the input dtype; each gradient is rounded once
Work        dQ 4 * Dk + 2 * Dv, dK and dV 4 * Dk + 4 * Dv FLOP a visible (query, head, key)
Reference   nsa_kernels.reference.compressed_attention_backward
Source      Dao 2023, arXiv:2307.08691, section 3.1
"""

import torch
from torch import Tensor

from nsa_kernels.common.hopper import hopper_takes
from nsa_kernels.common.tiles import check_attention_inputs, check_gradients, copyable_by_tma
from nsa_kernels.interval import hopper_grad_kv, hopper_grad_q
from nsa_kernels.interval.cmp_grad_q import grad_q
from nsa_kernels.interval.grad_kv import grad_kv
from nsa_kernels.interval.statistics import row_statistics


@torch.no_grad()
def compressed_attention_backward(
    grad_out: Tensor,
    gate: Tensor | None,
    delta: Tensor,
    softmax_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    softmax_scale: float,
    kv_dtype: torch.dtype | None = None,
    aligned: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate * out, out and softmax_lse what `compressed_attention` returned for the same arguments.

    grad_out [T, Hq, Dv]   gate [T, Hq] or None: 1   delta fp32 [T, Hq] = rowsum(grad_out * out), of the ungated out
    softmax_lse fp32 [T, Hq]
    kv_dtype            of dk and dv, for sums that go on elsewhere; None: those of k, v
    aligned             as `compressed_attention`
    returns dq [T, Hq, Dk], dk [M, Hkv, Dk], dv [M, Hkv, Dv]
    raises ValueError on shapes and dtypes that do not fit together
    """
    check_attention_inputs(q, k, v, begin, end, softmax_scale)
    check_gradients(grad_out, gate, delta, softmax_lse, q, v)
    if k.shape[0] == 0 or q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k, dtype=kv_dtype), torch.zeros_like(v, dtype=kv_dtype)
    q, k, v, grad_out = (copyable_by_tma(x) for x in (q, k, v, grad_out))
    begin, end = begin.contiguous(), end.contiguous()
    statistics = row_statistics(softmax_lse, delta, gate, begin, end, k.shape[1])
    arguments = (q, k, v, begin, end, statistics, grad_out, softmax_scale)
    if hopper_takes(q, k, aligned) and q.shape[2] == v.shape[2]:
        return hopper_grad_q.grad_q(*arguments), *hopper_grad_kv.grad_kv(*arguments, kv_dtype)
    apart = aligned is not True
    return grad_q(*arguments, apart), *grad_kv(*arguments, kv_dtype, apart=apart)
