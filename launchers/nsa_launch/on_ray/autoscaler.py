"""What a cluster may grow to, and what it is bringing up at this moment."""

from collections import Counter
from typing import Any


def promised(kind: str) -> float:
    """The most of a resource ("GPU") that one node of a type which the cluster may still bring up would have.

    0 where nobody says: open-source autoscalers keep their node types to themselves.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return max((float(group.resources.get(kind, 0)) for group in groups if group.max_count), default=0.0)


def growth() -> str:
    """The nodes that the autoscaler is bringing up, in words; empty when there are none, or no autoscaler."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.exceptions import RayError

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except (RayError, OSError, ValueError):  # only words are lost
        return ""
    return described(status)


def described(status: Any) -> str:
    """`ray.autoscaler.v2.schema.ClusterStatus` in words."""
    coming = Counter(node.ray_node_type_name for node in status.pending_nodes)
    for launch in status.pending_launches:
        coming[launch.ray_node_type_name] += launch.count
    said = []
    if coming:
        said.append("coming up: " + ", ".join(f"{count} x {name}" for name, count in sorted(coming.items())))
    for launch in status.failed_launches[-1:]:
        said.append(f"could not be launched: {launch.count} x {launch.ray_node_type_name}{_why(launch.details)}")
    return "; ".join(said)


def _why(details: str | None) -> str:
    return f" ({' '.join(details.split())[:120]})" if details else ""
