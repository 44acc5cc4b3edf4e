"""One run as jobs of a Ray cluster: submitted, found again by its output_dir, followed, stopped.

`client` is a `ray.job_submission.JobSubmissionClient` or something that behaves like one.
"""

import asyncio
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nsa_launch import exit_codes
from nsa_launch.config import RunConfig
from nsa_launch.jobs import remote
from nsa_launch.run_folder import RunFolder

_RUN, _STOPS = "nsa_dist_output_dir", "nsa_dist_stops"  # in a job's metadata
_LOOK_S = 1.0
_ASK_AGAIN_S = 30.0  # a STOP that came before the run had claimed its folder was taken away


def submit(client: Any, config: RunConfig) -> str:
    """Start the run as a job on the cluster's head; its id. The configuration travels as the job's own folder."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", config.run.output_dir.name)
    job = f"nsa-{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(remote.as_yaml(config), encoding="utf-8")
        return client.submit_job(
            entrypoint="exec python -m nsa_launch train config.yaml",
            submission_id=job,
            runtime_env={"working_dir": folder},
            metadata={_RUN: str(config.run.output_dir)},
        )


def found(client: Any, config: RunConfig) -> list[Any]:
    """The jobs of this run, the newest first."""
    mine = [job for job in client.list_jobs() if (job.metadata or {}).get(_RUN) == str(config.run.output_dir)]
    return sorted(mine, key=lambda job: job.start_time or 0, reverse=True)


def described(job: Any) -> str:
    """One line of a job."""
    began = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC)
    since = f", since {began:%Y-%m-%d %H:%M:%S} UTC" if job.start_time else ""
    code = f", exit code {job.driver_exit_code}" if job.driver_exit_code is not None else ""
    why = f": {' '.join(job.message.split())[:200]}" if _word(job) == "FAILED" and job.message else ""
    return f"{job.submission_id}  {_word(job)}{code}{since}{why}"


def is_over(job: Any) -> bool:
    return _word(job) in ("SUCCEEDED", "FAILED", "STOPPED")


def exit_code(job: Any) -> int:
    """The run's own; where it has none, 0 or 1 as Ray judges it."""
    if job.driver_exit_code is not None and job.driver_exit_code >= 0:
        return int(job.driver_exit_code)
    return exit_codes.OK if _word(job) == "SUCCEEDED" else exit_codes.FAILED


def follow(client: Any, job: str, show: Callable[[str], None]) -> int:
    """Show what the job writes until it is over; the run's exit code. A connection that breaks is made again."""
    num_shown = 0
    while True:
        num_shown = asyncio.run(_tail(client, job, show, num_shown))
        info = client.get_job_info(job)
        if is_over(info):
            show(client.get_job_logs(job)[num_shown:])
            return exit_code(info)
        time.sleep(_LOOK_S)


async def _tail(client: Any, job: str, show: Callable[[str], None], num_shown: int) -> int:
    """From the job's first character on each time, of which `num_shown` have been shown; how many are by now."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            show(text[max(0, num_shown - seen) :])
            seen += len(text)
    except RuntimeError:  # the connection went down under us
        pass
    return max(seen, num_shown)


def stop(client: Any, config: RunConfig, job: Any, now: bool) -> None:
    """Ask for an end: by the run's STOP file, which saves a checkpoint, or `now` by Ray, which may kill."""
    if now or _word(job) == "PENDING":
        client.stop_job(job.submission_id)
        return
    path = RunFolder(config.run.output_dir).stop
    client.submit_job(entrypoint=f"touch {shlex.quote(str(path))}", metadata={_STOPS: job.submission_id})


def wait_for_end(client: Any, config: RunConfig, job: Any, now: bool) -> Any:
    """The job once it is over, or as it is when `stop_grace_s` and half a minute have passed."""
    began_s = asked_s = time.monotonic()
    while not is_over(job) and time.monotonic() - began_s < config.launch.stop_grace_s + _ASK_AGAIN_S:
        time.sleep(_LOOK_S)
        job = client.get_job_info(job.submission_id)
        if time.monotonic() - asked_s > _ASK_AGAIN_S and not is_over(job):
            asked_s = time.monotonic()
            stop(client, config, job, now)
    return job


def _word(job: Any) -> str:
    return str(getattr(job.status, "value", job.status))
