"""One layer's attention by itself, as `nsa-dist bench cp` measures it: seconds, bytes sent and memory of one rank."""

from dataclasses import dataclass

from nsa_dist.planner.cluster import Cluster
from nsa_dist.planner.core.memory import layer_peak_bytes
from nsa_dist.planner.core.sizes import Core
from nsa_dist.planner.core.strategies import Options, Strategy, sent_bytes
from nsa_dist.planner.core.time import attention_s, merge_s, wire_s


@dataclass(frozen=True)
class LayerCost:
    """The busiest rank, one sequence. Of the wire what `Options.overlap` does not hide is counted in the seconds."""

    forward_s: float
    backward_s: float
    sent_bytes: dict[str, int]  # by kind, forward and backward
    peak_bytes: int  # inputs and the gradient of the output counted


def layer_cost(core: Core, strategy: Strategy, options: Options, cluster: Cluster) -> LayerCost:
    attention, wire = attention_s(core, strategy, cluster), wire_s(core, strategy, options, cluster)
    merging, exposed = merge_s(core, strategy, options, cluster), 1 - options.overlap
    forward_s, backward_s = (
        sum(compute.values()) + merging + exposed * sum(sent.values())
        for compute, sent in ((attention.forward, wire.forward), (attention.backward, wire.backward))
    )
    return LayerCost(
        forward_s, backward_s, sent_bytes(core, strategy, options), layer_peak_bytes(core, strategy, options)
    )
