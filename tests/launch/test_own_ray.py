"""A run's own Ray: it leaves no token behind, and wants neither a dashboard nor more memory without a word."""

import os

import pytest

from launch_cases import Command, tiny_file
from nsa_launch import exit_codes

pytestmark = pytest.mark.slow

# Of every process below: what `ray[default]` brings and `ray[train]` does not is not installed. Ray's agent of runtime
# environments has an aiohttp of its own.
HIDING = """
import sys


class Hidden:
    names = {"aiohttp", "aiohttp_cors", "colorful", "grpc", "opencensus", "opentelemetry", "prometheus_client"}

    def find_spec(self, name, path=None, target=None):
        has_own = any("runtime_env/agent/thirdparty_files" in place for place in sys.path)
        if name.partition(".")[0] in self.names and not has_own:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture(autouse=True)
def no_settings_of_rays(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


def test_without_the_dashboards_packages(tmp_path, monkeypatch):
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hiding'}:{os.environ.get('PYTHONPATH', '')}")
    command = Command(tiny_file(tmp_path), tmp_path)
    with command.started("steps=3") as launch:
        assert launch.wait(command.patience_s) == exit_codes.OK, command.said()
    said = command.said()
    assert "Ray has no dashboard here, as aiohttp is not installed; pip install 'ray[default]' brings it" in said
    assert "finished step 3 of 3" in said
    assert not (tmp_path / ".ray").exists()  # where Ray keeps a token that every later Ray would ask for


def test_its_memory_monitor_is_survived_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")  # always short of memory
    command = Command(tiny_file(tmp_path), tmp_path)
    with command.started("steps=3") as launch:
        assert launch.wait(command.patience_s) == exit_codes.FAILED
    said = command.said()
    assert "launching again from the last checkpoint" in said or "all ranks start again" in said
    assert "RAY_memory_monitor_refresh_ms=0" in said
    assert "Traceback" not in said
    assert all(len(line) < 700 for line in said.splitlines())
