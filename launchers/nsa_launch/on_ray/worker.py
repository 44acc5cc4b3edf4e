"""The function that Ray Train runs in each of its workers. It lives in a module so that it travels by name.

Ray has set the torchrun environment and initialised torch.distributed. This is not the main thread, so no signal
handler can be installed here, and the working directory is not the driver's, so every path is absolute.
"""

import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
import ray.train

from nsa_dist.train.refused import Refused
from nsa_launch.config import RunConfig
from nsa_launch.on_ray.hooks import RayHooks
from nsa_launch.on_ray.shown.prometheus import MemoryMetrics
from nsa_launch.processes import Processes
from nsa_launch.ranks import output as rank_output
from nsa_launch.run_folder import RunFolder


def payload(config: RunConfig, processes: Processes, launch_id: str) -> dict[str, Any]:
    """What the driver sends: plain data, so that a worker needs nothing of the driver's memory."""
    return {"config": config.model_dump(mode="json"), "processes": asdict(processes), "launch_id": launch_id}


def run_rank(sent: Mapping[str, Any], secrets: Mapping[str, str]) -> dict[str, Any]:
    """Train as one rank; the driver sees rank 0's return value.

    sent     what `payload` made; Ray may show it
    secrets  of `launch.env`, set here before anything that could read them is imported; Ray shows them nowhere
    """
    os.environ.update(secrets)
    config, processes = RunConfig.model_validate(sent["config"]), Processes(**sent["processes"])
    folder = RunFolder(config.run.output_dir)
    my_rank = ray.train.get_context().get_world_rank()
    rank_output.redirect(folder.rank_log(my_rank), f"rank {my_rank}, {sent['launch_id']}")
    if my_rank == 0:
        folder.record("processes", id=sent["launch_id"])
    from nsa_launch.ranks import rank  # only ranks pay for importing Megatron-core, and its warnings go to their files

    here = ray.get_runtime_context()
    node = str(here.get_node_id())
    domain = str(here.get_node_labels().get(config.launch.nvlink_label or "", node))
    try:
        with MemoryMetrics(folder.path.name, my_rank):
            return asdict(rank.run(config, processes, RayHooks(folder, my_rank), node, domain))
    except Refused as refusal:
        # A caller's mistake: starting again cannot help, and Ray Train has no word for that.
        folder.record("refused", reason=str(refusal))
        raise
    except Exception:
        traceback.print_exc()  # into the rank's file, whose end the console shows; Ray keeps its own copy elsewhere
        raise
