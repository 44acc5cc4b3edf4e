"""The comparison of both kinds of attention: its lines, its pictures, and one whole small run of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest

from nsa_launch.config import load

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/evidence"
COPY = ROOT / "configs/evidence/copy-cpu.yaml"


def example(name: str, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/evidence/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_train_both_kinds(path):
    for attention in ("nsa", "dense"):
        config = load(path, [f"model.attention={attention}"])
        assert config.world_size == 1
        assert_asks_for_what_is_far(config)


def assert_asks_for_what_is_far(config) -> None:
    assert config.run.sequence_length > config.nsa.window_len * 2, "what is asked for stands behind the window"
    blocks = config.run.sequence_length // config.nsa.slc_block_len
    assert blocks >= 2 * config.nsa.num_slc_blocks, "half of what is there is not selected"


CHILD = """
import json, sys, pathlib
folder, attention, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder.mkdir(parents=True)
(folder / "config.yaml").write_text("run: {steps: 4}")
right = {"dense": 1.0, "nsa": 0.5}[attention]
task = {"accuracy": right, "answers": 8, "by_length": {"256": {"accuracy": right, "answers": 8,
        "by_depth": [right, right, None, None, None]}}}
records = [{"kind": "train", "step": 4, "tokens": 1024, "loss": 2.0, "tokens_per_s": 100.0},
           *({"kind": "validation", "step": step, "loss": 5.0 - step, "by_position": {"64": 5.0, "128": 4.5 - step}}
             for step in (0, 4)),
           {"kind": "far_context", "step": 4, "kept": 20, "tokens": 40, "loss": 2.0, "loss_scrambled": 2.5},
           *({"kind": "tasks", "step": step, "tasks": {"copy": task, "recall": task}} for step in (0, 4))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
sys.exit(code)
"""


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """What `compare.py` makes of four runs that are none; the last one fails."""
    compare = example("compare", monkeypatch)

    def command(run) -> list[str]:
        fails = run.attention == "nsa" and run.seed == 2
        return [sys.executable, "-c", CHILD, str(run.folder), run.attention, str(3 * fails)]

    monkeypatch.setattr(compare.Run, "command", property(command))
    words = [str(COPY), "--out", str(tmp_path / "out"), "--seeds", "1", "2", "--at-once", "3", "--commit", "abc"]
    return compare.main(words), tmp_path / "out"


def test_every_run_has_a_line_with_what_repeats_it(compared, capsys):
    code, out = compared
    assert code == 1, "one failed"
    lines = {(each["attention"], each["seed"]): each for each in map(json.loads, (out / "results.jsonl").open())}
    assert lines.keys() == {("dense", 1), ("nsa", 1), ("dense", 2), ("nsa", 2)}
    one = lines["dense", 1]
    assert (one["experiment"], one["commit"], one["exit_code"], one["configuration"]) == (
        "copy-cpu", "abc", 0, {"run": {"steps": 4}},
    )  # fmt: skip
    assert one["validation"] == [[0, 5.0], [4, 1.0]]
    assert one["tasks"][-1]["copy"]["accuracy"] == 1.0
    assert one["by_position"][-1] == {"step": 4, "64": 5.0, "128": 0.5}
    assert one["far_context"] == [{"step": 4, "kept": 20, "tokens": 40, "loss": 2.0, "loss_scrambled": 2.5}]
    assert one["tokens_per_s"] == 100.0
    assert {"torch", "python"} <= one["versions"].keys()
    assert one["machine"].keys() >= {"processor", "system"}
    assert lines["nsa", 2]["exit_code"] == 3


def test_a_machine_without_git_or_gpu_has_lines_too(monkeypatch):
    compare = example("compare", monkeypatch)
    assert compare._told("no-such-program") is None
    assert compare._told(sys.executable, "-c", "raise SystemExit(1)") is None
    assert compare._told(sys.executable, "-c", "print('a GPU')") == "a GPU"
    monkeypatch.setattr(compare, "_told", lambda *_: None)
    assert compare._machine().keys() == {"processor", "system"}


def test_pictures_are_of_the_runs_that_ended(compared, tmp_path, monkeypatch, capsys):
    pictures, (_, out) = example("pictures", monkeypatch), compared
    capsys.readouterr()
    assert pictures.main([str(out / "results.jsonl"), "--out", str(tmp_path / "drawn")]) == 0
    assert "left out: nsa seed 2 ended with exit code 3" in capsys.readouterr().out
    drawn = {path.name: matplotlib.image.imread(path) for path in (tmp_path / "drawn").iterdir()}
    assert drawn.keys() == {"losses.png", "positions.png", "answers.png", "copy.png", "recall.png"}
    assert all(picture.std() > 0.01 for picture in drawn.values())


def test_stages_follow_one_another_and_are_drawn_apart(tmp_path, monkeypatch):
    """The run of seed 2 with NSA fails, and nothing follows it."""
    compare, pictures = example("compare", monkeypatch), example("pictures", monkeypatch)
    begun_with = {}

    def command(run) -> list[str]:
        begun_with[run.name] = run.before and run.before.folder
        fails = run.attention == "nsa" and run.seed == 2
        return [sys.executable, "-c", CHILD, str(run.folder), run.attention, str(3 * fails)]

    monkeypatch.setattr(compare.Run, "command", property(command))
    (tmp_path / "longer.yaml").write_text("run: {steps: 40, sequence_length: 512}\ndata: {task_lengths: [512]}\n")
    words = [str(COPY), "--then", str(tmp_path / "longer.yaml"), "--out", str(tmp_path / "out"), "--seeds", "1", "2"]
    assert compare.main([*words, "--commit", "abc", "--at-once", "2"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    ended = {(each["experiment"], each["attention"], each["seed"]) for each in lines}
    assert ended == {
        *(("copy-cpu", attention, seed) for attention in ("dense", "nsa") for seed in (1, 2)),
        ("longer", "dense", 1), ("longer", "nsa", 1), ("longer", "dense", 2),
    }  # fmt: skip
    assert begun_with["dense-seed1-longer"] == tmp_path / "out/dense-seed1"
    stage = load(tmp_path / "out/longer.yaml", [])
    assert (stage.run.steps, stage.run.sequence_length, stage.run.global_batch_size) == (40, 512, 16)
    assert stage.data.tasks == {"copy": 1.0}
    assert pictures.main([str(tmp_path / "out/results.jsonl"), "--out", str(tmp_path / "drawn")]) == 0
    assert {path.parent.name for path in (tmp_path / "drawn").rglob("losses.png")} == {"copy-cpu", "longer"}


def test_a_change_is_trained_beside_both_kinds_under_its_name(tmp_path, monkeypatch):
    compare, words = example("compare", monkeypatch), {}

    def command(run) -> list[str]:
        words[run.name] = (run.attention, list(run.words))
        return [sys.executable, "-c", CHILD, str(run.folder), run.attention, "0"]

    monkeypatch.setattr(compare.Run, "command", property(command))
    given = [str(COPY), "run.steps=4", "--out", str(tmp_path / "out"), "--at-once", "4", "--commit", "abc"]
    change = ["--change", "mean", "nsa.compression=mean", "--change", "short", "nsa.window_len=8"]
    assert compare.main([*given, *change]) == 0
    assert words == {
        "dense-seed1234": ("dense", ["run.steps=4"]),
        "nsa-seed1234": ("nsa", ["run.steps=4"]),
        "mean-seed1234": ("nsa", ["run.steps=4", "nsa.compression=mean"]),
        "short-seed1234": ("nsa", ["run.steps=4", "nsa.window_len=8"]),
    }
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert {line["attention"] for line in lines} == {"dense", "nsa", "mean", "short"}
    twice = ["mean", "a=1", "--change", "mean", "a=2"]
    names = [[name, "nsa.window_len=8"] for name in ("dense", "nsa", "converted-4", "../mean", "a/b", "a b", "")]
    for wrong in (["mean"], twice, *names):
        with pytest.raises(SystemExit):
            compare.main([*given, "--change", *wrong])


def test_what_dense_attention_learnt_goes_on_with_nsa_too(tmp_path, monkeypatch):
    """Converted once, when the first of three stages has ended; from there on it starts from itself."""
    compare, made = example("compare", monkeypatch), {}

    def command(run) -> list[str]:
        made[run.name] = (run.model if run.is_first_converted else run.before and run.before.folder, run.conversion)
        return [sys.executable, "-c", CHILD, str(run.folder), run.attention, "0"]

    monkeypatch.setattr(compare.Run, "command", property(command))
    monkeypatch.setattr(compare, "_machine", dict)
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: None)  # export and convert
    stages = [tmp_path / "2.yaml", tmp_path / "3.yaml"]
    for stage in stages:
        stage.write_text("nsa: {num_slc_blocks: 4}\n")
    words = [str(COPY), "--then", *map(str, stages), "--out", str(tmp_path / "out"), "--attention", "dense"]
    assert compare.main([*words, "--convert", "14", "4", "--seeds", "1", "--commit", "abc", "nsa.window_len=24"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    kinds = ("dense", "converted-14", "converted-4")
    assert {(each["experiment"], each["attention"]) for each in lines} == {
        ("copy-cpu", "dense"), *((stage, kind) for stage in "23" for kind in kinds),
    }  # fmt: skip
    out = tmp_path / "out"
    start, (export, convert) = made["converted-4-seed1-2"]
    assert start == out / "converted-4-seed1-2-model"
    assert export[-3:] == [str(out / "dense-seed1"), "--to", str(out / "converted-4-seed1-2-dense")]
    assert {"--gate-logit=4.0", "--num-slc-blocks=4", "--window-len=24", "--compression=mlp"} <= {*convert}
    assert made["converted-4-seed1-3"] == (out / "converted-4-seed1-2", [])
    before = {(each["experiment"], each["attention"]): each["before"] for each in lines}
    assert [text.split()[:4] for text in before["2", "converted-4"]] == [
        ["python", "-m", "nsa_launch", "export"], ["python", "-m", "nsa_launch", "convert"],
    ]  # fmt: skip
    assert before["3", "converted-4"] == before["2", "dense"] == []
    with pytest.raises(SystemExit):
        compare.main([*words, "--convert", "4", "4.0"])


@pytest.mark.parametrize("words", [["--convert", "4"], ["--then", str(COPY), "--convert", "4", "--attention", "nsa"]])
def test_nothing_is_converted_without_a_dense_stage(words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        example("compare", monkeypatch).main([str(COPY), *words, "--out", str(tmp_path / "out")])
    assert "give --then STAGE.yaml and --attention dense" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, ""])
def test_a_stage_that_says_nothing_is_refused_before_anything_runs(text, tmp_path, monkeypatch, capsys):
    stage = tmp_path / "stage.yaml"
    if text is not None:
        stage.write_text(text)
    with pytest.raises(SystemExit):
        example("compare", monkeypatch).main([str(COPY), "--then", str(stage), "--out", str(tmp_path / "out")])
    assert "stage.yaml is no file of sections and their keys; give one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in CONFIGS.rglob("*.yaml")} - {CONFIGS}), ids=lambda p: p.name
)
def test_stages_lead_to_what_is_asked(folder, tmp_path, monkeypatch):
    stages = example("compare", monkeypatch)._stages(sorted(folder.glob("*.yaml")), tmp_path)
    lengths = [load(stage, ["model.attention=dense"]).run.sequence_length for stage in stages]
    assert lengths == sorted(lengths)
    assert_asks_for_what_is_far(load(stages[-1], ["model.attention=nsa"]))


def test_curves_are_met_where_all_seeds_have_them(monkeypatch):
    pictures = example("pictures", monkeypatch)
    assert pictures.by_step_of([{0: 1.0, 5: 2.0, 9: 3.0}, {0: 3.0, 9: 5.0}]) == {0: [1.0, 3.0], 9: [3.0, 5.0]}
    assert pictures.averaged([0.5, None, 1.0]) == 0.75


def test_nothing_is_drawn_of_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").write_text(json.dumps({"attention": "nsa", "seed": 1, "exit_code": 1}) + "\n")
    assert example("pictures", monkeypatch).main([str(tmp_path / "results.jsonl"), "--out", str(tmp_path)]) == 1
    assert "there is nothing to draw" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_comparison(tmp_path):
    words = ["--out", str(tmp_path), "--at-once", "2", "run.steps=3", "optimizer.warmup_steps=1", "eval_interval=3"]
    command = [sys.executable, str(ROOT / "examples/evidence/compare.py"), str(COPY), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert {each["attention"] for each in lines} == {"dense", "nsa"}
    assert all(each["configuration"]["model"]["attention"] == each["attention"] for each in lines)
    assert all([r["step"] for r in each["tasks"]] == [0, 3] for each in lines)
    assert lines[0]["tasks"][0]["copy"]["answers"] == lines[1]["tasks"][0]["copy"]["answers"]


@pytest.mark.slow
def test_a_whole_conversion(tmp_path):
    """Where all 16 blocks are selected and the gates are closed, what was converted starts with the dense loss."""
    (tmp_path / "on.yaml").write_text("run: {steps: 2}\n")
    words = ["--then", str(tmp_path / "on.yaml"), "--attention", "dense", "--convert", "14", "--out", str(tmp_path)]
    few = ["run.steps=3", "optimizer.warmup_steps=1", "eval_interval=3", "nsa.num_slc_blocks=16"]
    command = [sys.executable, str(ROOT / "examples/evidence/compare.py"), str(COPY), *words, *few]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {each["attention"]: each for each in map(json.loads, (tmp_path / "results.jsonl").open())}
    dense, converted = (lines[kind]["validation"][0][1] for kind in ("dense", "converted-14"))
    assert converted == pytest.approx(dense, abs=1e-4)
