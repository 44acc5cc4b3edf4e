"""Fewer whole replicas when nodes are gone for good, and more again when they are back.

The size changes between two launches, never within one: Ray Train itself would take any number of ranks, tensor and
context parallel groups or not. Only whole nodes count, so that groups stay where their links are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nsa_launch.config import LaunchSection, RunConfig
from nsa_launch.processes import Processes, allowed_nodes


@dataclass
class Elastic:
    """What an elastic run does after an attempt has failed."""

    config: RunConfig
    num_failures: int = 0
    waited_s: float = 0  # in vain, since ranks were last lost

    @property
    def is_on(self) -> bool:
        return self.config.launch.min_data_parallel_size is not None

    def next(self, now: Processes, error: BaseException, num_whole_nodes: int) -> Processes | None:
        """The processes of the next attempt; None when there is to be none.

        After lost ranks as many nodes as before, which are waited for, or more if they are there. After waiting in
        vain as many as there are; those that are there and busy are waited for as long as `resources_timeout_s`.
        """
        launch = self.config.launch
        if _found_no_room(error) and self.waited_s < launch.resources_timeout_s:
            self.waited_s += max(launch.shrink_after_s, launch.start_timeout_s)
            most = min(num_whole_nodes, now.nodes)
        elif _lost_ranks(error) and self.num_failures < launch.max_failures:
            self.num_failures, self.waited_s = self.num_failures + 1, 0
            most = max(num_whole_nodes, now.nodes)
        else:
            return None
        fitting = [nodes for nodes in allowed_nodes(self.config) if nodes <= most]
        return replace(now, nodes=fitting[0] if fitting else now.nodes)

    def described(self, now: Processes, then: Processes) -> str:
        """What a change of size means, for people."""
        size, full = (self.config.data_parallel_size(n) for n in (then.world_size, self.config.world_size))
        grows = "" if size == full else "; it takes more at a later restart, once whole nodes are back"
        return (
            f"nodes: {now.nodes} -> {then.nodes}; going on from the last checkpoint with {size} of {full} "
            f"data-parallel replicas. The global batch and the order of samples stay, the last bits of losses may "
            f"differ{grows}"
        )


def whole_nodes(nodes: Iterable[Mapping[str, Any]], processes: Processes, launch: LaunchSection) -> int:
    """Of `ray.nodes()`, those that are alive and have room for all processes of a node, whatever runs there now."""
    needs = {"CPU": processes.per_node * processes.cpus_each, "GPU": processes.per_node * processes.gpus_each}
    if launch.accelerator_type:
        needs[f"accelerator_type:{launch.accelerator_type}"] = 0.001
    return sum(node["Alive"] and _has(node, needs, launch.label_selector) for node in nodes)


def _has(node: Mapping[str, Any], needs: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    """Labels asked for by an operator, such as `in(a,b)` or `!a`, are left to Ray."""
    resources, own = node["Resources"], node.get("Labels", {})
    plain = {name: value for name, value in labels.items() if not set("!(),") & set(value)}
    return all(resources.get(kind, 0) >= amount for kind, amount in needs.items()) and all(
        own.get(name) == value for name, value in plain.items()
    )


def _found_no_room(error: BaseException) -> bool:
    """The processes were not placed and started within `start_timeout_s`, or died while they started."""
    import ray.train

    cause = getattr(error, "controller_failure", None)
    return isinstance(error, ray.train.ControllerError) and type(cause).__name__.startswith("WorkerGroupStartup")


def _lost_ranks(error: BaseException) -> bool:
    import ray.train

    return isinstance(error, ray.train.WorkerGroupError)
