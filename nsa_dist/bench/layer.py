"""The layer on one rank's shard, called in the way that a case says."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nsa_dist.attention import nsa_attention
from nsa_dist.bench.case import Case
from nsa_dist.bench.gathered import gathered_attention
from nsa_dist.bench.gathered_heads import shared_attention
from nsa_dist.bench.shard import Shard
from nsa_dist.cp.comm import Comm
from nsa_dist.operators import default_ops


def layer_forward(case: Case, shard: Shard, comm: Comm, ops: Any = None) -> Callable[[], Tensor]:
    """A function that runs the layer forward: out [T, Hq, Dv]. The selection is that of `ops`, a kernels' module."""
    ops, plan = ops or default_ops(shard.q), case.plan()
    if case.gathers and case.cp_size > 1:
        attend = shared_attention if case.shared_kv else gathered_attention
        return lambda: attend(shard, case.cfg, plan, comm, ops, case.heads.dim_k**-0.5)

    def forward() -> Tensor:
        out = nsa_attention(
            shard.q, shard.kv, shard.gates, case.cfg, compress_k=shard.phi[0], compress_v=shard.phi[1],
            plan=plan, cp_group=comm, ops=ops, fetch=case.fetch_options, traffic=comm.traffic, trace=comm.trace,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return forward
