"""`submit`, `status`, `logs` and `stop`, against a stand-in for Ray's job server that behaves like one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch_cases import tiny_file
from nsa_launch import cli, exit_codes
from nsa_launch.config import load
from nsa_launch.jobs import client as ray_client
from nsa_launch.jobs import cluster_jobs


@dataclass
class Job:
    submission_id: str
    entrypoint: str
    metadata: dict
    files: dict[str, str]
    start_time: int
    status: str = "RUNNING"
    driver_exit_code: int | None = None
    message: str = ""


@dataclass
class Cluster:
    """Jobs that end with `exit_code` once `looks` questions about them have been asked."""

    exit_code: int = 0
    looks: int = 2
    breaks: int = 0  # times that the connection goes down while logs are followed
    jobs: list[Job] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    text: str = "first line\nsecond line\n"

    def submit_job(self, entrypoint, submission_id=None, runtime_env=None, metadata=None) -> str:
        folder = Path((runtime_env or {}).get("working_dir", "/nonexistent"))
        files = {path.name: path.read_text() for path in folder.glob("*")}
        job = Job(submission_id or f"raysubmit_{len(self.jobs)}", entrypoint, metadata, files, 1000 + len(self.jobs))
        self.jobs.append(job)
        return job.submission_id

    def list_jobs(self) -> list[Job]:
        return self.jobs

    def get_job_info(self, job_id: str) -> Job:
        (job,) = [job for job in self.jobs if job.submission_id == job_id]
        self.looks -= 1
        if self.looks <= 0:
            job.status, job.driver_exit_code = ("FAILED" if self.exit_code else "SUCCEEDED"), self.exit_code
        return job

    def get_job_logs(self, job_id: str) -> str:
        return self.text

    async def tail_job_logs(self, job_id: str) -> Any:
        for line in self.text.splitlines(keepends=True):
            yield line
            if self.breaks:
                self.breaks -= 1
                raise RuntimeError("the websocket was closed")

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(ray_client, "connected", lambda address: made)
    monkeypatch.setattr(cluster_jobs, "_LOOK_S", 0.0)
    return made


@pytest.fixture
def call(tmp_path, capsys):
    """A command on the tiny configuration; (exit code, what it printed)."""

    def run(command: str, *words: str) -> tuple[int, str]:
        code = cli.main([command, str(tiny_file(tmp_path)), *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.mark.parametrize("code", [0, 1, 2, 75, 143])
def test_submit_shows_the_log_and_ends_with_the_runs_own_exit_code(cluster, call, code):
    cluster.exit_code = code
    ended, said = call("submit")
    assert ended == code
    assert said.splitlines()[1:] == ["first line", "second line"]
    assert said.startswith(f"submitted {cluster.jobs[0].submission_id}\n")


def test_what_is_submitted_is_the_configuration(cluster, call, tmp_path):
    call("submit", "run.steps=7", "resume=true", "--no-wait")
    (job,) = cluster.jobs
    sent = tmp_path / "sent.yaml"
    sent.write_text(job.files["config.yaml"])
    config = load(sent)
    assert (config.run.steps, config.run.resume) == (7, True)
    assert config.run.output_dir == tmp_path / "run"
    arguments = cli.parser().parse_args(job.entrypoint.partition("nsa_launch ")[2].split())
    assert arguments.config == Path("config.yaml")  # in the job's own folder


def test_a_broken_connection_repeats_nothing(cluster, call):
    cluster.breaks, cluster.looks = 1, 3
    code, said = call("submit")
    assert code == exit_codes.OK
    assert said.splitlines()[1:] == ["first line", "second line"]


def test_a_job_that_never_ran_says_why(cluster, call):
    call("submit", "--no-wait")
    cluster.jobs[0].status, cluster.jobs[0].message = "FAILED", "no such\n  runtime environment"
    code, said = call("status")
    assert code == exit_codes.OK
    assert said.rstrip().endswith("FAILED, since 1970-01-01 00:00:01 UTC: no such runtime environment")
    assert cluster_jobs.exit_code(cluster.jobs[0]) == exit_codes.FAILED


def test_a_run_is_found_by_its_output_dir(cluster, call, tmp_path):
    call("submit", "--no-wait")
    call("submit", f"output_dir={tmp_path}/other", "--no-wait")
    call("submit", "--no-wait")
    _, said = call("status")
    first, other, last = (job.submission_id for job in cluster.jobs)
    assert [line.split()[0] for line in said.splitlines()] == [last, first]
    assert call("status", f"output_dir={tmp_path}/other")[1].split()[0] == other
    assert call("status", "--job", first)[1].split()[0] == first
    code, said = call("logs", f"output_dir={tmp_path}/third")
    assert code == exit_codes.BAD_CONFIG
    assert "give the same output_dir as to nsa-dist submit" in said


def test_logs_end_where_the_job_is_unless_followed(cluster, call):
    call("submit", "--no-wait")
    cluster.exit_code = 75
    assert call("logs") == (exit_codes.OK, cluster.text)
    assert call("logs", "--follow") == (75, cluster.text)


def test_stop_asks_for_a_checkpoint_again_and_again(cluster, call, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_jobs, "_ASK_AGAIN_S", 0.0)
    call("submit", "--no-wait")
    cluster.looks = 4
    code, said = call("stop")
    run, *asked = cluster.jobs
    assert code == exit_codes.OK
    assert f"{run.submission_id}  SUCCEEDED, exit code 0" in said
    assert len(asked) == 4
    assert {job.entrypoint for job in asked} == {f"touch {tmp_path / 'run' / 'STOP'}"}
    assert call("status")[1].splitlines() == [said.strip()]  # they are no jobs of the run


def test_stop_now_is_rays(cluster, call):
    call("submit", "--no-wait")
    assert call("stop", "--now", "--no-wait")[0] == exit_codes.OK
    assert cluster.stopped == [cluster.jobs[0].submission_id]


def test_a_job_that_waits_for_its_start_is_stopped_by_ray(cluster, call):
    call("submit", "--no-wait")
    cluster.jobs[0].status = "PENDING"
    call("stop")
    assert cluster.stopped == [cluster.jobs[0].submission_id]


def test_a_job_that_does_not_end_is_said(cluster, call):
    call("submit", "--no-wait")
    cluster.looks = 10**9
    code, said = call("stop", "launch.stop_grace_s=0.001", "--no-wait")
    assert code == exit_codes.OK
    cluster_jobs._ASK_AGAIN_S, before = 0.0, cluster_jobs._ASK_AGAIN_S
    try:
        code, said = call("stop", "launch.stop_grace_s=0.001")
    finally:
        cluster_jobs._ASK_AGAIN_S = before
    assert code == exit_codes.FAILED
    assert "nsa-dist stop --now kills it" in said


def test_ctrl_c_leaves_the_job_running(cluster, call, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "get_job_info", interrupted, raising=False)
    code, said = call("submit")
    assert code == 130
    assert "goes on without us; nsa-dist logs --follow shows it" in said
    assert not cluster.stopped


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["launch.address=local"], "give launch.address=auto"),
        (["output_dir=runs/x"], "output_dir=/runs/x"),
        (["launch.env.HF_TOKEN=x"], "give launch.env.HF_TOKEN=null"),
        (["processes_per_node=3"], "start 4 processes"),
    ],
)
def test_mistakes_are_refused_before_anything_is_sent(cluster, call, words, remedy):
    code, said = call("submit", *words)
    assert code == exit_codes.BAD_CONFIG
    assert remedy in said
    assert not cluster.jobs


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        (None, "give --address http://HEAD:8265, or export RAY_API_SERVER_ADDRESS"),
        ("head:6379", "give --address http://HEAD:8265"),
        ("http://127.0.0.1:1", "start Ray there with `ray start --head --dashboard-host=0.0.0.0`"),
    ],
)
def test_where_no_dashboard_is(call, monkeypatch, address, remedy):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    code, said = call("status", *(["--address", address] if address else []))
    assert code == exit_codes.BAD_CONFIG
    assert remedy in said
    assert len(said.splitlines()) == 1


def test_secrets_do_not_travel(cluster, call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    call("submit", "launch.env.HF_TOKEN=null", "--no-wait")
    (job,) = cluster.jobs
    assert yaml.safe_load(job.files["config.yaml"])["launch"]["env"] == {"HF_TOKEN": None}
    assert "hunter2" not in str(job)
