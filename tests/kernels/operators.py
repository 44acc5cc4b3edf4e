"""Every public function with small arguments that fit it: what tests of all of them take turns with."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.packs import pack
from nsa_kernels import reference

T, HQ, HKV, D, LEN, SLOTS = 48, 4, 2, 16, 16, 2
PACK = pack([20, 13], block_len=8, stride=4, slc_block_len=LEN)
SELECT = {
    "softmax_scale": 0.25, "cmp_block_len": 8, "cmp_stride": 4, "slc_block_len": LEN, "num_slc_blocks": SLOTS,
    "num_init_blocks": 1, "num_local_blocks": 1,
}  # fmt: skip


@dataclass
class Operator:
    """`call(ops, tensors)` gives the results; gradients of those in `differentiable` can be asked of them."""

    tensors: dict[str, Tensor]
    call: Callable[[ModuleType, dict[str, Tensor]], tuple[Tensor, ...]]
    differentiable: tuple[str, ...] = ()

    def results(self, ops: ModuleType, tensors: dict[str, Tensor]) -> list[Tensor]:
        """What comes out, then the gradients, from `tensors` and upstream gradients `grad_0`, `grad_1`, ... in them."""
        leaves = {name: tensors[name].detach().requires_grad_() for name in self.differentiable}
        given = {**tensors, **leaves}
        outs = list(self.call(ops, given))
        if not leaves:
            return outs
        upstream = [tensors[f"grad_{i}"].to(y.dtype) for i, y in enumerate(outs)]
        # -inf takes no gradient, and the two implementations for training give softmax_lse none
        pairs = [(y, g) for y, g in zip(outs, upstream, strict=True) if y.requires_grad and y.dim() == 3]
        grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        return [*(y.detach() for y in outs), *grads]


def operators() -> dict[str, Operator]:
    """One of each public function, floating-point tensors in fp64."""
    x = _Drawn()
    rows = PACK.begin, PACK.end
    ints = {"begin": rows[0], "end": rows[1]}
    qkv = {"q": x(T, HQ, D), "k": x(PACK.num_blocks, HKV, D), "v": x(PACK.num_blocks, HKV, D)}
    pages = {"q": x(T, HQ, D), "k": x(T, HKV, D), "v": x(T, HKV, D)}
    window = {"begin": torch.arange(T).sub(5).clamp(0).int(), "end": torch.arange(1, T + 1).int()}
    _, lse = reference.compressed_attention(*qkv.values(), *rows, softmax_scale=0.25)
    chosen = {
        "block_indices": reference.select_blocks(
            qkv["q"], qkv["k"], lse, *rows, PACK.position, PACK.doc_start, **SELECT
        ),
        "block_table": torch.arange(3, dtype=torch.int32).expand(HKV, -1).clone(),
        "position": PACK.position,
    }  # fmt: skip
    blocks = {"block_rows": torch.tensor([3, 9, 0], dtype=torch.int32)}
    mlp = {"pos_emb": x(HKV, 8, D), "w1": x(HKV, 8 * D, D) / 11, "w2": x(HKV, D, D) / 4}
    twin = {f"{name}_v": x(*w.shape) / 4 for name, w in mlp.items()}
    branches = {name: x(T, HQ, D) for name in ("out_cmp", "out_slc", "out_win")}
    upstream = {"grad_out": x(T, HQ, D), "gate": x.unit(T, HQ), "delta": x(T, HQ)}
    scale: dict[str, Any] = {"softmax_scale": 0.25}
    paged: dict[str, Any] = {**scale, "slc_block_len": LEN}
    grads = {"grad_0": x(T, HQ, D), "grad_1": x(T, HQ)}
    small = {"grad_0": x(3, HKV, D), "grad_1": x(3, HKV, D)}

    def plain(name: str, tensors: dict, differentiable=(), upstream=None, **options) -> Operator:
        def call(ops, t):
            result = getattr(ops, name)(*(t[argument] for argument in tensors), **options)
            return result if isinstance(result, tuple) else (result,)

        return Operator({**tensors, **(upstream or {})}, call, tuple(differentiable))

    def pair(ops, t):
        phis = [tuple(t[f"{name}{end}"] for name in mlp) for end in ("", "_v")]
        return ops.compress_mlp_pair(t["k"], t["v"], t["block_rows"], *phis)

    def backward(name: str, keys: dict, index: dict, options: dict) -> Operator:
        forward = name.removesuffix("_backward")
        _, softmax_lse = getattr(reference, forward)(*keys.values(), *index.values(), **options)
        return plain(name, {**upstream, "softmax_lse": softmax_lse, **keys, **index}, **options)

    names = ("q", "k", "v")
    both = {"k": x(T, HKV, D), "v": x(T, HKV, D), **blocks, **mlp, **twin, **small}
    return {
        "compress_mean": Operator(
            {"x": x(20, HKV, D), **blocks, **small},
            lambda ops, t: (ops.compress_mean(t["x"], t["block_rows"], 8),),
            ("x",),
        ),
        "compress_mlp": plain("compress_mlp", {"x": x(20, HKV, D), **blocks, **mlp}, ("x", *mlp), small),
        "compress_mlp_pair": Operator(both, pair, ("k", "v", *mlp, *twin)),
        "compressed_attention": plain("compressed_attention", {**qkv, **ints}, names, grads, **scale),
        "window_attention": plain("window_attention", {**pages, **window}, names, grads, **scale),
        "selected_attention": plain("selected_attention", {**pages, **chosen}, names, grads, **paged),
        "select_blocks": plain(
            "select_blocks",
            {"q": qkv["q"], "k": qkv["k"], "lse": lse, **ints, "position": PACK.position, "doc_start": PACK.doc_start},
            **SELECT,
        ),
        "combine": plain("combine", {"gates": x.unit(T, HQ, 3), **branches}, ("gates", *branches), grads),
        "gate_deltas": plain("gate_deltas", {"grad_out": x(T, HQ, D), **branches}),
        "sum_branches": plain("sum_branches", branches),
        "merge": plain(
            "merge",
            {"out_a": x(T, HQ, D), "lse_a": x(T, HQ), "out_b": x(T, HQ, D), "lse_b": x(T, HQ)},
            ("out_a", "out_b"),
            grads,
        ),
        "compressed_attention_backward": backward("compressed_attention_backward", qkv, ints, scale),
        "window_attention_backward": backward("window_attention_backward", pages, window, scale),
        "selected_attention_backward": backward("selected_attention_backward", pages, chosen, paged),
    }


class _Drawn:
    """Random fp64 tensors, the same in every run."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64)
