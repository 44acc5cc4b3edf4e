"""A Ray of one's own that does not start, as when the machine is too busy for Ray's half minute."""

import pytest
import ray

from launch_cases import tiny
from nsa_launch import exit_codes
from nsa_launch.on_ray import driver
from nsa_launch.processes import decide
from nsa_launch.run_folder import RunFolder

WORDS = "The current node timed out during startup."


@pytest.mark.parametrize("error", [Exception(WORDS), RuntimeError(WORDS), ConnectionError(WORDS)])
def test_it_is_said_with_what_to_do(tmp_path, monkeypatch, capsys, error):
    def init(**_):
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(driver.environment, "prepare_driver", lambda settings: None)
    config = tiny(tmp_path)
    plan = driver.Plan(config, None, decide(config, 0))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert driver.run(plan, folder) == exit_codes.NO_RESOURCES
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "did not start" in line]
    assert line.startswith(f"Ray did not start on this machine: {WORDS} Nothing was trained; when the machine")
    assert "resume=true" in line
    assert "torchrun" in line
