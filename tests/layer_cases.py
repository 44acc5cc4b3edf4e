"""What ranks of `NSALayer` do: importable, because spawned processes find work by name."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from cases import SMALL
from nsa_dist import ShardPlan
from nsa_dist.layer import NSALayer
from nsa_dist.rope_scaling import Llama3Scaling, Rotary, YarnScaling

LENGTHS = [0, 41, 160]
KINDS: dict[str, dict] = {
    "mlp": {},
    "mean, shared": {"compression": "mean", "shared_kv": True},
    "compressed after RoPE": {"compress_before_rope": False},
    "shared, after RoPE": {"compress_before_rope": False, "shared_kv": True},
    "values of their own size": {"v_head_dim": 6, "bias": True},
    "norms, gates' bias, Llama 3": {
        "qk_norm": "rms", "gate_bias": True, "rotary": Rotary(100.0, scaling=Llama3Scaling(8, 1, 4, 64)),
        "compression": "mean",
    },
    "norms around a mean, YaRN": {
        "qk_norm": "layer", "rotary": Rotary(100.0, scaling=YarnScaling(4, 64)), "compression": "mean",
    },
    "norms without weights, half a head": {"qk_norm": "l2", "rotary": Rotary(100.0, 0.5), "compression": "mean"},
    "no positions": {"rotary": Rotary(percent=0), "compression": "mean"},
}  # fmt: skip


def layer_of(kind: str, dtype=torch.float64) -> NSALayer:
    torch.manual_seed(0)
    layer = NSALayer(24, 4, 2, 8, SMALL, dtype=dtype, **{"rotary": Rotary(100.0), **KINDS[kind]})
    with torch.no_grad():
        layer.qkv.weight.mul_(3)
        for name, parameter in layer.named_parameters():
            if "_norm" in name or "gate" in name:
                parameter += torch.randn_like(parameter) / 3
    return layer


def trained(layer: NSALayer, x: Tensor, upstream: Tensor, **where) -> dict[str, Tensor]:
    """out, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    out = layer(x, **where)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * upstream).sum(), [x, *parameters])
    return {"out": out.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


def inputs() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    return tuple(torch.randn(LENGTHS[-1], 24, generator=gen, dtype=torch.float64) for _ in range(2))


def over_ranks(rank: int) -> dict[str, float]:
    """For each kind the largest difference to one rank; "fsdp": of the weights after steps of sharded layers."""
    x, upstream = inputs()
    plan = ShardPlan.zigzag(LENGTHS, dist.get_world_size(), SMALL.slc_block_len)
    worst = {}
    for kind in KINDS:
        layer = layer_of(kind)
        alone = trained(layer, x, upstream, cu_seqlens=LENGTHS)
        parts = [plan.shard(y, rank) for y in (x, upstream)]
        mine = trained(layer, *parts, plan=plan, cp_group=dist.group.WORLD)
        for name in sorted(mine.keys() - {"out", "x"}):
            dist.all_reduce(mine[name])
        whole = {n: plan.shard(y, rank) if n in ("out", "x") else y for n, y in alone.items()}
        real = ~plan.padding(rank)
        worst[kind] = max(
            ((mine[n] - whole[n])[real].abs().max() if n in ("out", "x") else (mine[n] - whole[n]).abs().max()).item()
            for n in mine
        )
    return {**worst, "fsdp": _fsdp(rank)}


def _fsdp(rank: int) -> float:
    x, upstream = inputs()
    batch = torch.stack([x[:60], x[60:120]]), torch.stack([upstream[:60], upstream[60:120]])
    plain, sharded = layer_of("mlp"), layer_of("mlp")
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer, rows in ((plain, slice(None)), (sharded, slice(rank, rank + 1))):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        for _ in range(2):
            loss = (layer(batch[0][rows]) * batch[1][rows]).sum() / len(batch[0][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pairs = zip(plain.parameters(), sharded.parameters(), strict=True)
    return max((a - b.full_tensor()).abs().max().item() for a, b in pairs)
