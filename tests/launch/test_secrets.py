"""Values of `launch.env` with names like WANDB_API_KEY: in no file of a run, nowhere printed, there on resuming."""

import json
import stat

import pytest
import yaml

from launch_cases import tiny, tiny_file
from nsa_dist.train.config_errors import is_secret
from nsa_dist.train.prepare import note_settings
from nsa_dist.train.refused import Refused
from nsa_launch import cli, exit_codes
from nsa_launch.config import load
from nsa_launch.on_ray import worker
from nsa_launch.on_ray.environment import worker_environment
from nsa_launch.processes import decide
from nsa_launch.run_folder import claimed

VALUE = "hunter2-hunter2"
NAMES = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "apikey", "MY_SECRET", "X_PWD"]
PUBLIC = ["NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "KEYBOARD", "CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("name", NAMES)
def test_these_names_are_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_these_are_not(name):
    assert not is_secret(name)


def everything_below(folder) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_a_run_has_a_secret(tmp_path, name):
    config = tiny(tmp_path, f"launch.env.{name}={VALUE}", "launch.env.NCCL_DEBUG=INFO")
    assert config.launch.env == {name: VALUE, "NCCL_DEBUG": "INFO"}
    with claimed(config) as folder:
        note_settings(folder.output, config)
    other = config.launch.model_copy(update={"env": {name: f"{VALUE}2"}})
    assert VALUE not in json.dumps(note_settings(folder.output, config.model_copy(update={"launch": other})))
    assert VALUE not in everything_below(folder.path)
    written = yaml.safe_load((folder.path / "config.yaml").read_text())["launch"]["env"]
    assert written == {name: None, "NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize("words", [[], ["launch.env.A=b"]])
def test_nobody_else_reads_a_configuration_with_an_environment(tmp_path, words):
    with claimed(tiny(tmp_path, *words)) as folder:
        mode = stat.S_IMODE((folder.path / "config.yaml").stat().st_mode)
    assert (mode == 0o600) == bool(words)


def test_the_written_configuration_goes_on_with_the_secret_of_the_environment(tmp_path, monkeypatch):
    with claimed(tiny(tmp_path, f"launch.env.HF_TOKEN={VALUE}")) as folder:
        folder.output.metrics.write_text('{"kind": "train", "step": 1, "loss": 5.0}\n')
    saved = folder.path / "config.yaml"
    with pytest.raises(Refused, match=r"HF_TOKEN is null .*export HF_TOKEN, or give launch\.env\.HF_TOKEN"):
        load(saved, ["resume=true"])
    assert load(saved, ["resume=true", "launch.env.HF_TOKEN=other"]).launch.env == {"HF_TOKEN": "other"}
    monkeypatch.setenv("HF_TOKEN", VALUE)
    config = load(saved, ["resume=true"])
    assert config.launch.env == {"HF_TOKEN": VALUE}
    with claimed(config) as folder:
        assert VALUE not in everything_below(folder.path)


def test_null_stands_for_the_launchers_own_whatever_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert tiny(tmp_path, "launch.env.NCCL_DEBUG=null").launch.env == {"NCCL_DEBUG": "WARN"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_has_no_secret(tmp_path, capsys, name):
    assert cli.main(["config", str(tiny_file(tmp_path)), f"launch.env.{name}={VALUE}"]) == exit_codes.OK
    printed = capsys.readouterr().out
    assert VALUE not in printed
    assert yaml.safe_load(printed)["launch"]["env"] == {name: None}


@pytest.mark.parametrize(
    "words",
    [
        ["launch.env={A_KEY: [" + VALUE + "]}"],
        ["launch.env={A_KEY: {" + VALUE + ": 1}}"],
        ["launch.env={A_KEY: " + VALUE],
        ["launch.env.A_KEY=" + VALUE + "\x00"],
        ["run.env.A_KEY=" + VALUE],
        ["launch.env.A_KEY=" + VALUE, "launch.env={B: [1]}"],
    ],
)
def test_no_refusal_repeats_a_secret(tmp_path, words):
    with pytest.raises(Refused) as caught:
        tiny(tmp_path, *words)
    assert VALUE not in str(caught.value)


def test_no_refusal_of_a_file_repeats_a_secret(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"launch:\n  env: {{A_KEY: {VALUE}\n  nodes: 1\n")
    with pytest.raises(Refused, match="is not valid YAML") as caught:
        load(path)
    assert VALUE not in str(caught.value)


def test_ray_is_given_no_secret_that_it_would_show(tmp_path):
    """Its runtime environment stands in its logs, and the arguments of the training function on its dashboard."""
    from nsa_launch.on_ray.trainer import trainer

    config = tiny(tmp_path, f"launch.env.HF_TOKEN={VALUE}", "launch.env.NCCL_DEBUG=INFO")
    processes = decide(config, 0)
    assert worker_environment(config, processes)["NCCL_DEBUG"] == "INFO"
    assert VALUE not in str(worker_environment(config, processes))
    assert VALUE not in json.dumps(worker.payload(config, processes, "launch"))
    made = trainer(config, processes, "launch")
    assert VALUE not in str(made.train_loop_config) + str(made.run_config)
    assert made.train_loop_per_worker.keywords == {"secrets": {"HF_TOKEN": VALUE}}
