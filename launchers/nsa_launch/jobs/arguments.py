"""The words of `nsa-dist submit`, `status`, `logs`, `stop` and `render`; what they ask for is imported when used."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_launch.commands.words import help_words

_CLUSTER = "nsa-dist {} configs/long-1m.yaml output_dir=/runs/x resume=true --address http://HEAD:8265"


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the command line."""
    _submit(commands)
    _status(commands)
    _logs(commands)
    _stop(commands)
    _render(commands)


def _submit(commands: Any) -> None:
    parser = _of_a_run(
        commands,
        "submit",
        "train on a Ray cluster, as a job of it",
        "Check the configuration here, send it to a Ray cluster, which must have nsa-dist installed, start it there, "
        "and show what it writes. Ctrl-C leaves the job running. Exit codes: those of nsa-dist train.",
        _CLUSTER.format("submit"),
        _CLUSTER.format("submit") + " --no-wait",
    )
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is submitted")


def _status(commands: Any) -> None:
    _of_a_run(
        commands,
        "status",
        "the jobs of a run on a Ray cluster",
        "A line for each job that trains into the configuration's output_dir, the newest first. Exit codes: 0 printed, "
        "2 refused, or no such job.",
        _CLUSTER.format("status"),
        job=True,
    )


def _logs(commands: Any) -> None:
    parser = _of_a_run(
        commands,
        "logs",
        "what a run's newest job has written",
        "Print what the run's newest job has written. With --follow go on until it ends, with the exit codes of "
        "nsa-dist train; otherwise 0 printed, 2 refused.",
        _CLUSTER.format("logs") + " --follow",
        job=True,
    )
    parser.add_argument("--follow", action="store_true", help="go on until the job ends")


def _stop(commands: Any) -> None:
    parser = _of_a_run(
        commands,
        "stop",
        "end a run on a Ray cluster with a checkpoint",
        "Ask the run's newest job for a checkpoint and an end, through the STOP file in its output_dir, and wait for "
        "it. Exit codes: 0 it has ended, 1 it has not within launch.stop_grace_s, 2 refused.",
        _CLUSTER.format("stop"),
        job=True,
    )
    parser.add_argument(
        "--now",
        action="store_true",
        help="let Ray stop it: SIGTERM, and SIGKILL after the head's RAY_JOB_STOP_WAIT_TIME_S, 3 s unless set",
    )
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait for the end")


def _render(commands: Any) -> None:
    parser = commands.add_parser(
        "render",
        help="files for Kubernetes or Slurm that start a run",
        **help_words(
            "Print what starts the configuration elsewhere, the configuration inside: for k8s a ConfigMap and a RayJob "
            "of KubeRay (1.5.1 or newer), for slurm a batch script. Exit codes: 0 printed, 2 refused.",
            "nsa-dist render k8s configs/long-1m.yaml output_dir=/runs/x --image IMAGE --claim PVC > x.yaml",
            "nsa-dist render slurm configs/long-1m.yaml output_dir=/shared/x --time 1-00:00:00 > x.sbatch",
        ),
    )
    parser.add_argument("kind", choices=("k8s", "slurm"))
    _config(parser)
    parser.add_argument("--name", help="of the job; default: the last part of output_dir")
    parser.add_argument("--memory-gib", type=int, default=64, metavar="N", help="k8s: of a rank (default 64)")
    parser.add_argument("--image", default="registry.example/nsa-dist:TAG", help="k8s: that has nsa-dist (Dockerfile)")
    parser.add_argument("--claim", default="runs-rwx", metavar="PVC", help="k8s: storage that every pod mounts")
    parser.add_argument("--mount", default="/runs", metavar="PATH", help="k8s: where; output_dir lies below it")
    parser.add_argument(
        "--rdma", metavar="RESOURCE=N", help="k8s: network cards of a node, such as rdma/hca_shared_devices_a=1"
    )
    parser.add_argument("--interface", metavar="NAME", help="of NCCL's and gloo's sockets, such as eth0")
    parser.add_argument("--time", default="1-00:00:00", metavar="D-HH:MM:SS", help="slurm: limit of one allocation")
    parser.add_argument("--partition", metavar="NAME", help="slurm")
    parser.set_defaults(command=_late("render"))


def _of_a_run(commands: Any, name: str, short: str, long: str, *examples: str, job: bool = False) -> Any:
    parser = commands.add_parser(name, help=short, **help_words(long, *examples))
    _config(parser)
    parser.add_argument(
        "--address", metavar="URL", help="the cluster's dashboard, http://HEAD:8265; default: $RAY_API_SERVER_ADDRESS"
    )
    if job:
        parser.add_argument("--job", metavar="ID", help="another job of the run than its newest")
    parser.set_defaults(command=_late(name))
    return parser


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example output_dir=/runs/x")


def _late(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from nsa_launch.jobs import commands

        return commands.refusing(getattr(commands, name))(arguments)

    return run
