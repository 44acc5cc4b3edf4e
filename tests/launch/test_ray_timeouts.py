"""What Ray is told of the configuration's times: all of them, fractions included."""

import pytest

from launch_cases import tiny
from nsa_launch.on_ray.environment import ray_settings
from nsa_launch.processes import decide


@pytest.mark.parametrize("seconds", ["0.5", "20", "1234567.25"])
def test_times_reach_ray_as_they_are(tmp_path, seconds):
    config = tiny(tmp_path, f"process_group_timeout_s={seconds}", f"start_timeout_s={seconds}")
    settings = ray_settings(config)
    assert float(settings["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"]) == float(seconds)
    assert float(settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == float(seconds)
    assert float(settings["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) == max(30, float(seconds))


def test_ranks_meet_for_as_long_as_a_start_may_take(tmp_path):
    from nsa_launch.on_ray.trainer import trainer

    for words, expected in ((["process_group_timeout_s=0.5"], 300), (["process_group_timeout_s=900.5"], 900.5)):
        config = tiny(tmp_path, *words)
        made = trainer(config, decide(config, 0), "launch-test")
        assert made.backend_config.timeout_s == expected
