"""`nsa-dist submit`, `status`, `logs`, `stop` and `render`: what each does once its words are known."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from nsa_dist.train.refused import Refused
from nsa_launch import exit_codes
from nsa_launch.config import RunConfig
from nsa_launch.jobs import client as ray_client
from nsa_launch.jobs import cluster_jobs, remote

_INTERRUPTED = 130


def submit(arguments: argparse.Namespace) -> int:
    config = remote.load(arguments.config, arguments.overrides)
    client = ray_client.connected(arguments.address)
    job = cluster_jobs.submit(client, config)
    say(f"submitted {job}")
    if arguments.no_wait:
        return exit_codes.OK
    return _follow(client, job)


def status(arguments: argparse.Namespace) -> int:
    _, _, jobs = _jobs(arguments)
    for job in jobs:
        say(cluster_jobs.described(job))
    return exit_codes.OK


def logs(arguments: argparse.Namespace) -> int:
    client, _, (job, *_) = _jobs(arguments)
    if arguments.follow:
        return _follow(client, job.submission_id)
    _show(client.get_job_logs(job.submission_id))
    return exit_codes.OK


def stop(arguments: argparse.Namespace) -> int:
    client, config, (job, *_) = _jobs(arguments)
    if cluster_jobs.is_over(job):
        say(cluster_jobs.described(job))
        return exit_codes.OK
    cluster_jobs.stop(client, config, job, arguments.now)
    if arguments.no_wait:
        return exit_codes.OK
    job = cluster_jobs.wait_for_end(client, config, job, arguments.now)
    say(cluster_jobs.described(job))
    if cluster_jobs.is_over(job):
        return exit_codes.OK
    say("it has not ended yet; nsa-dist logs shows what it does, nsa-dist stop --now kills it")
    return exit_codes.FAILED


def render(arguments: argparse.Namespace) -> int:
    from nsa_launch.jobs import kubernetes, slurm

    config = remote.load(arguments.config, arguments.overrides)
    text = kubernetes.rendered(config, arguments) if arguments.kind == "k8s" else slurm.rendered(config, arguments)
    print(text, end="")
    return exit_codes.OK


def refusing(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, with refusals as one message and exit code 2."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except Refused as error:
            print(f"nsa-dist: {error}", file=sys.stderr)
            return exit_codes.BAD_CONFIG

    return run


def say(text: str) -> None:
    print(text, flush=True)


def _jobs(arguments: argparse.Namespace) -> tuple[Any, RunConfig, list[Any]]:
    """Client, configuration and the run's jobs, of which there is at least one."""
    config = remote.load(arguments.config, arguments.overrides)
    client = ray_client.connected(arguments.address)
    jobs = [job for job in cluster_jobs.found(client, config) if arguments.job in (None, job.submission_id)]
    if not jobs:
        which = f" called {arguments.job}" if arguments.job else ""
        raise Refused(
            f"the cluster knows no job{which} of output_dir={config.run.output_dir}, by which a run's jobs are found; "
            f"give the same output_dir as to nsa-dist submit"
        )
    return client, config, jobs


def _follow(client: Any, job: str) -> int:
    try:
        return cluster_jobs.follow(client, job, _show)
    except KeyboardInterrupt:
        say(f"\n{job} goes on without us; nsa-dist logs --follow shows it, nsa-dist stop ends it with a checkpoint")
        return _INTERRUPTED


def _show(text: str) -> None:
    print(text, end="", flush=True)
