"""Our configuration in Ray Train's words. Import it after `environment.prepare_driver`."""

from functools import partial
from typing import Any

import ray.train
import ray.train.torch

from nsa_launch.config import LaunchSection, RunConfig
from nsa_launch.hangs.watch import hung_ranks
from nsa_launch.on_ray import worker
from nsa_launch.on_ray.environment import worker_environment
from nsa_launch.on_ray.failures import reason
from nsa_launch.processes import Processes
from nsa_launch.run_folder import RunFolder

_V2: Any = ray.train  # on import it puts the classes of version 2 under names which type checkers read as version 1


class FailureLog(ray.train.UserCallback):
    """Writes down which ranks failed, from Ray Train's controller, before it starts them again."""

    def __init__(self, folder: RunFolder, timeout_s: float) -> None:
        self._folder, self._timeout_s = folder, timeout_s

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        reasons = {rank: reason(error) for rank, error in worker_exceptions.items()}
        hung = hung_ranks(self._folder, reasons, self._timeout_s)
        self._folder.record("failure", ranks={str(rank): why for rank, why in reasons.items()}, hung=hung)


def trainer(config: RunConfig, processes: Processes, launch_id: str) -> Any:
    """One launch. Ray Train keeps its own record of it in a folder that is new each time.

    A record that a crash tore, or that names a checkpoint which has been pruned since, stops every later launch of the
    same name; and it is not needed, because ranks find the newest intact checkpoint themselves.
    """
    folder = RunFolder(config.run.output_dir)
    return _V2.torch.TorchTrainer(
        partial(worker.run_rank, secrets=config.launch.secrets),
        train_loop_config=worker.payload(config, processes, launch_id),
        torch_config=_V2.torch.TorchConfig(
            backend=processes.backend,
            timeout_s=config.launch.rendezvous_timeout_s,  # Ray says int, and hands it to timedelta
        ),
        scaling_config=_scaling(config, processes),
        run_config=_V2.RunConfig(
            name=launch_id,
            storage_path=str(folder.ray),
            failure_config=_patience(config.launch),
            checkpoint_config=_V2.CheckpointConfig(num_to_keep=2),
            logging_config=_V2.LoggingConfig(log_level="ERROR"),
            callbacks=[FailureLog(folder, config.launch.process_group_timeout_s)],
            worker_runtime_env={"env_vars": worker_environment(config, processes)},
        ),
    )


def _scaling(config: RunConfig, processes: Processes) -> Any:
    """A fixed number of identical workers: Ray's elastic sizes know nothing of tensor or context parallel groups.

    Ray numbers the workers of one placement group contiguously by node, so groups of consecutive ranks stay together.
    """
    resources = {"CPU": processes.cpus_each}
    if processes.device == "cuda":
        resources["GPU"] = processes.gpus_each
    return _V2.ScalingConfig(
        num_workers=processes.world_size,
        use_gpu=processes.device == "cuda",
        resources_per_worker=resources,
        placement_strategy="STRICT_PACK" if processes.nodes == 1 else "PACK",
        accelerator_type=config.launch.accelerator_type,
        label_selector=config.launch.label_selector or None,
    )


def _patience(launch: LaunchSection) -> Any:
    """Restarts after lost ranks, and how many attempts to find room before giving up; Ray's default is for ever.

    An elastic run is started again by the driver, which may take another number of ranks (`elastic`).
    """
    is_elastic = launch.min_data_parallel_size is not None
    patience_s = launch.shrink_after_s if is_elastic else launch.resources_timeout_s
    return _V2.FailureConfig(
        max_failures=0 if is_elastic else launch.max_failures,
        controller_failure_limit=max(1, round(patience_s / launch.start_timeout_s)) - is_elastic,
    )
