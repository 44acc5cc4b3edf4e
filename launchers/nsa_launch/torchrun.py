"""The same run without Ray: `torchrun --nproc-per-node 2 -m nsa_launch.torchrun CONFIG.yaml [key=value ...]`.

torchrun decides how many processes there are; `launch.nodes` and `launch.processes_per_node` are not read. The first
SIGINT or SIGTERM saves a checkpoint; torchrun itself kills what has not ended 30 s later. A process that fails is
started again from the last checkpoint with `torchrun --max-restarts N`.
"""

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from nsa_dist.train.files.records import Record
from nsa_dist.train.refused import Refused
from nsa_launch import exit_codes
from nsa_launch.commands import doctor
from nsa_launch.config import RunConfig, load
from nsa_launch.console import Console
from nsa_launch.hangs.among_ranks import RankWatch
from nsa_launch.memory.among_ranks import shortage_said
from nsa_launch.processes import Processes, check_fixed_size, check_groups, decide
from nsa_launch.ranks import environment, rank
from nsa_launch.ranks.hooks import FolderHooks
from nsa_launch.ranks.meeting import store_of_attempt
from nsa_launch.run_folder import RunFolder, claimed
from nsa_launch.stop_signals import StopSignals


def main(argv: Sequence[str] | None = None) -> int:
    """One rank's exit code. Only rank 0 speaks."""
    path, *overrides = sys.argv[1:] if argv is None else argv
    with ExitStack() as stack:
        try:
            config = load(Path(path), overrides)
            check_fixed_size(config)
            config = _as_started(config)
            ours = environment.of_nccl(config.world_size)  # torchrun has set some of it otherwise
            os.environ.update(ours | config.launch.public_env | config.launch.secrets)
            if config.launch.device == "cpu":
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Megatron-core uses a GPU that it sees
            check_groups(config)
            processes = decide(config, doctor.machine().gpus)
            folder = _claim(config, stack)
            return _train(config, processes, folder)
        except Refused as error:
            _say(f"nsa-dist: {error}")
            return exit_codes.BAD_CONFIG
        except Exception as error:
            if os.environ["LOCAL_RANK"] == "0":
                print(f"nsa-dist: {_consequence(config, error)}", file=sys.stderr, flush=True)
            raise


def _consequence(config: RunConfig, error: Exception) -> str:
    """What torchrun will do about a rank's failure, of which it says nothing itself."""
    lines = str(error).strip().splitlines()
    reason = lines[-1][:160] if lines else type(error).__name__
    done, allowed = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    failed = f"rank {os.environ['RANK']} on {socket.gethostname()} failed ({reason})"
    if done >= allowed:
        return f"{failed}, and torchrun has no restart left (--max-restarts {allowed}); go on with resume=true"
    lost = (
        f"; if one of the {config.launch.nodes} nodes is gone it waits for that in vain: end it on all of them, and "
        f"start it again with resume=true"
    )
    return (
        f"{failed}; torchrun starts all ranks again from the last checkpoint ({done + 1} of {allowed} times)"
        f"{lost if config.launch.nodes > 1 else ''}"
    )


def _as_started(config: RunConfig) -> RunConfig:
    """The configuration with torchrun's own numbers of nodes and processes."""
    per_node, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    launch = config.launch.model_copy(update={"processes_per_node": per_node, "nodes": world // per_node})
    return config.model_copy(update={"launch": launch})


def _claim(config: RunConfig, stack: ExitStack) -> RunFolder:
    """Rank 0 claims the run's folder; a restart by torchrun goes on with what the first attempt left."""
    if int(os.environ["RANK"]) != 0:
        return RunFolder(config.run.output_dir)
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    run = config.run.model_copy(update={"resume": True, "overwrite": False}) if is_restart else config.run
    return stack.enter_context(claimed(config.model_copy(update={"run": run})))


class _ShownHooks(FolderHooks):
    """Rank 0 shows the run's progress itself: there is no driver."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        super().__init__(folder)
        self._console = console

    def on_metrics(self, record: Record) -> None:
        self._console.update()


def _train(config: RunConfig, processes: Processes, folder: RunFolder) -> int:
    timeout = timedelta(seconds=config.launch.rendezvous_timeout_s)
    with StopSignals(lambda _: folder.stop.touch()) as signals, Console(config, folder, ranks_speak=True) as console:
        store, mine, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = store_of_attempt(store, mine, world_size, timeout)
        dist.init_process_group(processes.backend, store=store, rank=mine, world_size=world_size, timeout=timeout)
        host = socket.gethostname()
        hooks, watch = _ShownHooks(folder, console), RankWatch(config.launch, folder, dist.get_rank())
        with watch.naming_the_hung(), shortage_said(config, folder, mine):
            result = rank.run(config, processes, hooks, host, nvlink_domain=host, on_beat=watch.look)
        if dist.get_rank() == 0:
            console.finish(asdict(result))
        dist.destroy_process_group()
    if result.failure:
        return exit_codes.FAILED
    return exit_codes.stopped_by(signals.received) if signals.received and result.stopped else exit_codes.OK


def _say(text: str) -> None:
    if int(os.environ["RANK"]) == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
