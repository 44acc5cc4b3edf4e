"""One YAML file and the command line's words over it become one checked configuration, or one clear error."""

from pathlib import Path

import pytest

from launch_cases import tiny, tiny_file
from nsa_launch.config import load


def test_a_bare_name_finds_its_section(tmp_path):
    config = tiny(tmp_path, "resume=true", "lr=2e-3", "max_failures=0")
    assert config.run.resume
    assert config.optimizer.lr == 2e-3
    assert config.launch.max_failures == 0


def test_a_dotted_name_goes_anywhere(tmp_path):
    config = tiny(
        tmp_path, "parallel.context_parallel_size=1", "launch.env.NCCL_DEBUG=INFO", "launch.label_selector={a: b}"
    )
    assert config.parallel.context_parallel_size == 1
    assert config.launch.env == {"NCCL_DEBUG": "INFO"}
    assert config.launch.label_selector == {"a": "b"}


def test_the_last_word_wins(tmp_path):
    assert tiny(tmp_path, "steps=30", "run.steps=40").run.steps == 40


def test_processes_default_to_one_replica(tmp_path):
    assert tiny(tmp_path).world_size == 2
    assert tiny(tmp_path, "context_parallel_size=1").world_size == 1
    assert tiny(tmp_path, "processes_per_node=4", "nodes=2").world_size == 8


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path, "output_dir=runs/x", "folder=texts")
    assert config.run.output_dir == tmp_path / "runs/x"
    assert config.data.folder == tmp_path / "texts"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("stpes=3", r"there is no key 'stpes'; did you mean run\.steps\?"),
        ("run.stpes=3", r"run\.stpes: no such key; did you mean 'steps'\?"),
        ("lunch.nodes=3", r"lunch: no such key; did you mean 'launch'\?"),
        ("launch=3", r"'launch' is a section, not a key: override its keys one by one, as launch\.NAME=value"),
        ("resume", r"must be key=value.*for example resume=true"),
        ("run.steps.more=1", r"goes below 'steps'.*drop the rest of the path"),
        ("steps=many", r"run\.steps: .*integer.*given 'many'"),
        ("device=gpu", r"launch\.device: .*'cpu'.*'cuda'.*given 'gpu'"),
        ("steps=[1", r"is not YAML; quote it"),
        ("sequence_length=300", r"take sequence_length=512"),
        ("processes_per_node=0", r"launch\.processes_per_node: .*greater than or equal to 1"),
    ],
)
def test_a_wrong_word_is_named_with_its_remedy(tmp_path, word, remedy):
    with pytest.raises(ValueError, match=remedy):
        tiny(tmp_path, word)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("run: [", "is not valid YAML"),
        ("- run", "holds list, but a configuration is a mapping of sections"),
        ("run: {steps: 1}\nrun: {steps: 2}", "the key 'run' is given twice"),
        ("model: {}", "run: this key is needed"),
        ("run: {output_dir: x, stpes: 3}", r"run\.stpes: no such key; did you mean 'steps'"),
        ("run: {output_dir: x, nodes: 3}", r"run\.nodes: no such key here; it belongs to the section 'launch'"),
    ],
)
def test_a_wrong_file_is_named_with_its_remedy(tmp_path, text, remedy):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=remedy) as caught:
        load(path)
    assert "wrong.yaml" in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read .*the first argument is a YAML file"):
        load(Path("nowhere.yaml"))


def test_a_written_configuration_reads_back(tmp_path):
    import yaml

    config = tiny(tmp_path, "launch.env.A=b")
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load(copy) == config


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    config = load(path)
    assert config.data_parallel_size(config.world_size) >= 1


def test_the_file_alone_decides_without_words(tmp_path):
    assert load(tiny_file(tmp_path)) == tiny(tmp_path)


def test_scaling_of_positions_in_a_file_and_as_words(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "run: {output_dir: runs/a}\nmodel: {num_layers: 4}\n"
        "nsa: {no_rope_freq: 2, rope_scaling: {rope_type: yarn, factor: 4.0, truncate: false}}\n"
    )
    assert load(path).nsa.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "truncate": False}
    assert load(path).no_rope == [0, 1, 0, 1]
    words = ["nsa.rope_scaling.factor=8", "no_rope_freq=[1, 0, 0, 0]"]
    assert load(path, words).nsa.rope_scaling["factor"] == 8
    assert load(path, words).no_rope == [1, 0, 0, 0]
    assert load(path, ["rope_scaling={rope_type: llama3, factor: 8}"]).nsa.rope_scaling["rope_type"] == "llama3"
    for word, remedy in {
        "no_rope_freq=3": "take no_rope_freq=4", "nsa.rope_scaling.factor=-1": "factor=-1 must be positive",
        "rotary_percent=0.3": "take percent=1 and stretch=1", "nsa.rope_scaling.beta=1": "leave beta out",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=remedy):
            load(path, [word])
