"""A Ray to work in: one's own on this machine, or a cluster that is there already."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nsa_dist.train.refused import Refused
from nsa_launch.processes import Processes

_OBJECT_STORE_BYTES = 100 * 2**20  # no data goes through it; the default is 30 % of the machine's memory


def check_address(address: str) -> None:
    """ValueError for a way of joining a cluster that cannot carry a training run."""
    if address.startswith("ray://"):
        raise Refused(
            f"launch.address={address} is a Ray Client, and the run would end with its connection; submit the command "
            f"to the cluster instead: ray job submit -- nsa-dist train ..."
        )


@contextmanager
def own(processes: Processes, settings: Mapping[str, str]) -> Iterator[None]:
    """A private Ray with exactly the room this run needs; it ends with the context."""
    with _initialised(
        settings,
        address="local",
        num_cpus=math.ceil(processes.world_size * processes.cpus_each),
        num_gpus=processes.per_node * processes.gpus_each,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=True,  # Ray Train asks it about its actors, and complains every second without it
    ):
        yield


@contextmanager
def joined(address: str, settings: Mapping[str, str]) -> Iterator[None]:
    """The cluster at `address`, for the length of the context. ConnectionError when nothing answers there."""
    try:
        with _initialised(settings, address=address):
            yield
    except ConnectionError as error:
        raise ConnectionError(
            f"no Ray answers at {address} ({error}); start one with `ray start --head`, or take launch.address=local "
            f"to run on this machine alone"
        ) from None


@contextmanager
def _initialised(settings: Mapping[str, str], **options: Any) -> Iterator[None]:
    import ray

    # log_to_driver: what ranks print is in their own files, and what goes wrong comes back as an exception.
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": dict(settings)})
    try:
        yield
    finally:
        ray.shutdown()


def gpus_of_a_node() -> int:
    """GPUs of the best-equipped node of the cluster we are in."""
    import ray

    return max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)


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
