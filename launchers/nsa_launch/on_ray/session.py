"""A Ray to work in: one's own on this machine, or a cluster that is there already."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from nsa_launch.config import LaunchSection, RunConfig
from nsa_launch.on_ray import autoscaler, elastic
from nsa_launch.on_ray.failures import plain
from nsa_launch.on_ray.joining.address import Address
from nsa_launch.on_ray.shown import messages
from nsa_launch.processes import Processes, decide

_OBJECT_STORE_BYTES = 100 * 2**20  # no data goes through it; the default is 30 % of the machine's memory


class RayDidNotStart(Exception):
    """A Ray of one's own that did not come up: what it said, and what to do."""


@contextmanager
def own(processes: Processes, settings: Mapping[str, str], say: Callable[[str], None]) -> Iterator[None]:
    """A private Ray with exactly the room this run needs; it ends with the context. RayDidNotStart."""
    room = {
        "num_cpus": math.ceil(processes.world_size * processes.cpus_each),
        "num_gpus": processes.per_node * processes.gpus_each,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    dashboard = not missing_of_dashboard()
    with ExitStack() as stack:
        try:
            stack.enter_context(_initialised(settings, say, address="local", include_dashboard=dashboard, **room))
        except Exception as error:  # so is what Ray raises when one of its processes dies, or takes more than 30 s
            raise RayDidNotStart(
                f"Ray did not start on this machine: {plain(str(error), longest=400)} Nothing was trained; when the "
                f"machine is less busy, run the same command again, with resume=true if the run has a checkpoint. "
                f"torchrun needs no Ray (docs/how-to/cluster.md)"
            ) from None
        yield


def missing_of_dashboard() -> str:
    """The package for want of which Ray has no dashboard (`ray[default]` brings it), or nothing."""
    try:
        import ray.dashboard.optional_deps  # noqa: F401
    except ImportError as error:
        return error.name or str(error)
    return ""


@contextmanager
def joined(address: Address, settings: Mapping[str, str], say: Callable[[str], None]) -> Iterator[None]:
    """The cluster at `address`, which answers (`reach`), for the length of the context.

    ConnectionError when it does not take this process in, as where no node of it is on this machine.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_initialised(settings, say, address=address.text))
        except (ConnectionError, RuntimeError) as error:
            why = plain(f"{error} {error.__cause__ or ''}", longest=400)
            raise ConnectionError(
                f"the Ray at {address.text} ({address.origin}) answers, but this machine cannot join it: {why}; run "
                f"the command on one of its nodes, under the same Python and Ray, or submit it: nsa-dist submit "
                f"CONFIG.yaml --address http://HEAD:8265"
            ) from None
        yield


@contextmanager
def _initialised(settings: Mapping[str, str], say: Callable[[str], None], **options: Any) -> Iterator[None]:
    import ray

    # log_to_driver: what ranks print is in their own files, and what goes wrong comes back as an exception.
    with messages.shortened(say):
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": dict(settings)})
        try:
            yield
        finally:
            ray.shutdown()


def gpus_of_a_node() -> int:
    """GPUs of the best-equipped node that the cluster we are in has, or that its autoscaler says it may bring up."""
    import ray

    present = (node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"])
    return int(max(autoscaler.promised("GPU"), *present))


def processes_of_cluster(config: RunConfig, say: Callable[[str], None]) -> Processes:
    """The processes of a run on the cluster we are in; `device=auto` without a GPU there is said, not just done."""
    gpus = gpus_of_a_node()
    if not gpus and config.launch.device == "auto":
        say(
            "no node of the cluster has a GPU now, so launch.device=auto takes CPUs; launch.device=cuda waits for "
            "nodes with GPUs, as an autoscaler brings up, and launch.device=cpu says that CPUs are meant"
        )
    return decide(config, gpus, may_grow=True)


def whole_nodes(processes: Processes, launch: LaunchSection) -> int:
    """Nodes of the cluster we are in with room for all processes of a node (`elastic.whole_nodes`)."""
    import ray

    return elastic.whole_nodes(ray.nodes(), processes, launch)


def missing_resources(processes: Processes) -> str:
    """What the whole cluster lacks for this run at this moment, in words; empty when it has everything."""
    import ray

    has = ray.cluster_resources()
    needs = {"CPU": processes.cpus_each, "GPU": processes.gpus_each}
    lacking = [
        f"{each * processes.world_size:g} {kind}s, of which it has {has.get(kind, 0):g}"
        for kind, each in needs.items()
        if each * processes.world_size > has.get(kind, 0)
    ]
    return " and ".join(lacking)


def release_placement() -> int:
    """Remove what this command's earlier attempts still reserve in the cluster; how many reservations that were.

    A controller that is killed while it starts its workers leaves its placement group behind: Ray Train's cleaner does
    not know of it yet, and a Ray of one's own has no room for a second one.
    """
    import ray
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()  # with which the id of a group ends that it made
    table = ray.util.placement_group_table()
    held = [name for name, group in table.items() if name.endswith(job) and group["state"] != "REMOVED"]
    for name in held:
        ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))
    return len(held)
