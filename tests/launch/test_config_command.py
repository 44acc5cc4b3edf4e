"""`nsa-dist config`: what it prints is a configuration, and says what every key means."""

from pathlib import Path

import pytest
import yaml

from launch_cases import TINY, tiny_file
from nsa_launch import exit_codes
from nsa_launch.cli import main
from nsa_launch.commands.keys import sections
from nsa_launch.config import RunConfig, load

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = [(section.name, key) for section in sections(RunConfig) for key in section.keys]


def printed(capsys, *words: str) -> str:
    assert main(["config", *words]) == exit_codes.OK
    return capsys.readouterr().out


def loaded(text: str, folder: Path) -> RunConfig:
    path = folder / "printed.yaml"
    path.write_text(text)
    return load(path)


def test_every_key_has_a_meaning_on_one_line():
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, f"{name} has no description"
            assert "\n" not in field.description
            assert not field.is_required() or field.examples, f"{name} has neither default nor example"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_printed_file_reads_back(path, tmp_path, capsys):
    words = ["run.steps=77", 'launch.env={A: "x # y", B: "1\\n2", C: "3", D: "\u00e9: yes"}', "data.pattern='*.txt'"]
    assert loaded(printed(capsys, str(path), *words), tmp_path) == load(path, words)


def test_the_defaults_are_a_file_that_train_takes(tmp_path, capsys):
    (tmp_path / "least.yaml").write_text("run: {output_dir: runs/x}")
    assert loaded(printed(capsys, "output_dir=runs/x"), tmp_path) == load(tmp_path / "least.yaml")
    assert loaded(printed(capsys), tmp_path).run.output_dir == Path("runs/my-run").absolute()


def test_every_key_is_printed_with_its_value_and_meaning(tmp_path, capsys):
    text = printed(capsys, str(tiny_file(tmp_path)))
    values, lines = yaml.safe_load(text), text.splitlines()
    for section, key in KEYS:
        assert values[section][key.name] == TINY.get(section, {}).get(key.name, values[section][key.name])
        (line,) = (line for line in lines if line.startswith(f"  {key.name}: "))
        assert line.endswith(key.meaning)
    assert {section: set(below) for section, below in values.items()} == {
        section: {key.name for where, key in KEYS if where == section} for section, _ in KEYS
    }


def test_paths_stay_as_they_are_written(tmp_path, capsys):
    assert "  output_dir: runs/tiny-cpu " in printed(capsys, str(CONFIGS / "tiny-cpu.yaml"))


def test_the_listing_has_type_default_and_meaning(capsys):
    lines = [line.split(maxsplit=1) for line in printed(capsys, "--keys").splitlines() if line.startswith("  ")]
    said = dict(lines)
    assert list(said) == [key.name for _, key in KEYS]
    for _, key in KEYS:
        assert said[key.name].endswith(key.meaning)
    for name, start in {
        "output_dir": ["path", "needed"],
        "steps": ["int", ">=", "1", "300"],
        "validation_fraction": ["float", ">", "0,", "<", "1", "0.05"],
        "layout": ["zigzag", "|", "contiguous", "zigzag"],
        "processes_per_node": ["int", ">=", "1", "|", "null", "null"],
        "label_selector": ["{text:", "text}", "{}"],
        "adam_eps": ["float", ">", "0", "1.0e-08"],
    }.items():
        assert said[name].split()[: len(start)] == start


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["nowhere.yaml"], "the first argument is a YAML file"),
        (["stpes=3"], "did you mean run.steps?"),
        (["sequence_length=300"], "take sequence_length="),
        (["run.steps=3", "mine.yaml"], "is not an override: it must be key=value"),
        (["--keys", "run.steps=3"], "leave it out, or --keys"),
    ],
)
def test_mistakes_are_refused(words, remedy, capsys):
    assert main(["config", *words]) == exit_codes.BAD_CONFIG
    captured = capsys.readouterr()
    assert remedy in captured.err
    assert captured.out == ""
