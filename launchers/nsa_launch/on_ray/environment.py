"""The environment that Ray reads when it is imported, and the one its processes get.

Ray has no other way to set most of this. Nothing outside this file touches the environment for Ray's sake.
"""

import os
from collections.abc import Mapping

from nsa_launch.config import RunConfig
from nsa_launch.on_ray.joining import tokens
from nsa_launch.processes import Processes
from nsa_launch.ranks import environment as of_ranks

_LEAST_PATIENCE_S = 30.0  # with a rank that does not answer Ray: a busy process may take some seconds


def ray_settings(config: RunConfig) -> dict[str, str]:
    """Environment of driver, controller and workers."""
    launch = config.launch
    return {
        "RAY_TRAIN_V2_ENABLED": "1",
        # How soon a dead rank is noticed, and for how long ray.train.report blocks: 2 s by default.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(launch.start_timeout_s),
        # These wait for ever, ten minutes, or half a minute for each hung rank, unless told otherwise.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(launch.process_group_timeout_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(max(launch.process_group_timeout_s, _LEAST_PATIENCE_S)),
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
        # Every print would appear twice, every report once per rank, and tracebacks merged line by line.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
        "RAY_DEDUP_LOGS": "0",
        # The dashboard's Train page is empty without it.
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        # A process more for notices of nodes about to go, which nobody here acts upon.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def own_ray_settings() -> dict[str, str]:
    """Environment of a Ray of our own, on top of `ray_settings`."""
    return {
        **tokens.of_own_ray(),
        # It may choose Ray Train's controller; the kernel takes the largest process, a rank, which is started again.
        "RAY_memory_monitor_refresh_ms": "0",
    }


def worker_environment(config: RunConfig, processes: Processes) -> dict[str, str]:
    """Environment of each rank, set before its process starts. `launch.env` has the last word, but for its secrets.

    Ray writes this one into its logs and onto its dashboard; a secret goes to the rank itself (`worker.run_rank`).
    """
    hidden_gpus = {"CUDA_VISIBLE_DEVICES": ""} if processes.device == "cpu" else {}
    return {
        **hidden_gpus,  # Megatron-core uses a GPU that it sees
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron-core needs kernels in the order of their launches
        **of_ranks.of_nccl(processes.world_size),
        "OMP_NUM_THREADS": str(processes.threads_each),
        "PYTHONUNBUFFERED": "1",
        **config.launch.public_env,
    }


def prepare_driver(settings: Mapping[str, str]) -> None:
    """Set what the driver's own import of Ray reads. What the user has set stays."""
    for name, value in {**settings, "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
