"""One configuration trained dense and with NSA, over seeds, all else equal; what came of it as lines of JSON.

    python examples/evidence/compare.py configs/evidence/copy-cpu.yaml --out runs/copy-cpu --seeds 1 2 run.steps=50

Every run is a process of its own on one device, through torchrun; `--at-once` of them share it. With `--then` each goes
on in stages: a stage's file has the keys that are otherwise than in the one before, and takes its weights from there.
With `--change NAME key=value ...` NSA is also trained with that changed, under that name.
With `--convert` the dense model of the first stage is also made one with NSA, which goes through the stages beside it.
OUT gets a folder and a log for each, and `results.jsonl` a line as each ends: the experiment, its whole configuration,
commit, machine, software, and the losses and answers by step. `pictures.py` draws them. If a run failed, its line says
so, and the exit code is 1.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

import yaml

from nsa_dist.config import NSAConfig
from nsa_dist.train.files.records import read_metrics
from nsa_launch.config import load
from nsa_launch.versions import versions

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("train", "validation", "tasks", "far_context")  # of records that a line is made of


@dataclass
class Run:
    """One of the comparison, from its start to its line."""

    stages: Sequence[Path]  # this one's configuration, and those that come after it
    attention: str
    seed: int
    out: Path
    words: Sequence[str]
    gate_logits: Sequence[float] = ()  # of the models that a dense one is converted to when this stage has ended
    before: "Run | None" = None
    converted: float | None = None  # a model that was dense, by its gates' logit
    change: str = ""  # what the words change, by its name
    started: float = 0.0
    process: subprocess.Popen | None = None
    log: IO[str] | None = field(default=None, repr=False)

    @property
    def config(self) -> Path:
        return self.stages[0]

    @property
    def name(self) -> str:
        letters = self.kind.strip("[]").replace(",", "-").replace(" ", "")
        stage = f"-{self.config.stem}" if self.before else ""
        return f"{letters}-seed{self.seed}{stage}"

    @property
    def kind(self) -> str:
        """What the lines and the pictures call it."""
        return self.change or (self.attention if self.converted is None else f"converted-{self.converted:g}")

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def model(self) -> Path:
        """What a dense run becomes: `nsa-dist export` and `convert` write it."""
        return self.out / f"{self.name}-model"

    @property
    def is_first_converted(self) -> bool:
        return self.converted is not None and self.before is not None and self.before.converted is None

    @property
    def command(self) -> list[str]:
        own = [f"model.attention={self.attention}", f"run.seed={self.seed}", f"output_dir={self.folder}"]
        if self.before is not None:
            own += [f"run.start_from={self.model if self.is_first_converted else self.before.folder}"]
        own += ["nsa.gate_bias=true"] if self.converted is not None else []
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        return [*torchrun, "-m", "nsa_launch.torchrun", str(self.config), *own, *self.words]

    def start(self) -> None:
        self.started = time.monotonic()
        self.log = (self.out / f"{self.name}.log").open("w")
        for command in self.conversion:  # where one fails, the run says what is missing
            subprocess.run(command, stdout=self.log, stderr=subprocess.STDOUT, check=False)
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT)

    @property
    def conversion(self) -> list[list[str]]:
        """The commands that make `model` of the dense run before it, with the sizes of NSA that this stage has."""
        if self.before is None or not self.is_first_converted:
            return []
        dense, program = self.out / f"{self.name}-dense", [sys.executable, "-m", "nsa_launch"]
        nsa = load(self.config, self.words).nsa
        names = [*(each.name for each in fields(NSAConfig)), "compression"]
        sizes = [f"--{name.replace('_', '-')}={getattr(nsa, name)}" for name in names]
        return [
            [*program, "export", str(self.before.folder), "--to", str(dense)],
            [*program, "convert", str(dense), "--to", str(self.model), f"--gate-logit={self.converted}", *sizes],
        ]

    def next(self) -> list["Run"]:
        """What comes after this one, if it came to its end."""
        if len(self.stages) == 1 or self.process is None or self.process.returncode:
            return []
        following = replace(self, stages=self.stages[1:], gate_logits=(), before=self, process=None, log=None)
        converted = [replace(following, attention="nsa", converted=logit) for logit in self.gate_logits]
        return [following, *converted]

    def result(self, commit: str | None, machine: dict[str, str]) -> dict[str, Any]:
        """Its line, whether it came to its end or not."""
        assert self.process is not None
        metrics = {kind: read_metrics(self.folder / "metrics.jsonl", kind) for kind in KINDS}
        speeds = [record["tokens_per_s"] for record in metrics["train"]]
        return {
            "experiment": self.config.stem,
            "attention": self.kind,
            "seed": self.seed,
            "exit_code": self.process.returncode,
            "seconds": round(time.monotonic() - self.started, 1),
            "tokens_per_s": median(speeds) if speeds else None,
            "train": [[r["step"], r["tokens"], r["loss"]] for r in metrics["train"]],
            "validation": [[r["step"], r["loss"]] for r in metrics["validation"]],
            "tasks": [{"step": r["step"], **r["tasks"]} for r in metrics["tasks"]],
            "by_position": [{"step": r["step"], **r.get("by_position", {})} for r in metrics["validation"]],
            "far_context": [{name: r[name] for name in r if name != "kind"} for r in metrics["far_context"]],
            "command": _of_any_environment(self.command),
            "before": list(map(_of_any_environment, self.conversion)),  # what made the model that it starts from
            "configuration": _configuration(self.folder / "config.yaml"),
            "commit": commit,
            "machine": machine,
            "versions": versions(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("words", nargs="*", metavar="key=value", help="for every run, as nsa-dist train takes them")
    parser.add_argument(
        "--then", nargs="*", type=Path, default=[], metavar="STAGE.yaml", help="each from the last's weights"
    )
    parser.add_argument(
        "--convert",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="the dense one, at its first stage's end, by a gate logit each",
    )
    parser.add_argument(
        "--change",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "key=value"),
        help="NSA with these changed; may be given again",
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder; runs that it holds are not overwritten")
    parser.add_argument("--attention", nargs="+", default=["dense", "nsa"], help="words or patterns, [nsa,dense]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234])
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the device")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    arguments = parser.parse_intermixed_args(argv)
    for path in [arguments.config, *arguments.then]:
        if not path.is_file() or not isinstance(yaml.safe_load(path.read_text()), dict):
            parser.error(f"{path} is no file of sections and their keys; give one, as configs/evidence has them")
    if arguments.convert and not (arguments.then and "dense" in arguments.attention):
        parser.error(
            "--convert makes NSA of what dense attention has learnt; give --then STAGE.yaml and --attention dense"
        )
    if len(set(arguments.convert)) < len(arguments.convert):
        parser.error("--convert has a logit twice, and their runs would be one folder; give each once")
    changes = {name: words for name, *words in arguments.change}
    taken = [name for name in changes if not re.fullmatch(r"(?!converted-|dense$|nsa$)[\w-]+", name)]
    if taken or len(changes) < len(arguments.change) or not all(changes.values()):
        parser.error(
            "--change takes what is changed behind a name of its own, of letters, digits and dashes, which lines and "
            "folders have in place of nsa"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    stages = _stages([arguments.config, *arguments.then], arguments.out)
    runs = [
        Run(stages, attention, seed, arguments.out, arguments.words, arguments.convert if attention == "dense" else ())
        for seed in arguments.seeds
        for attention in arguments.attention
    ]
    runs += [
        Run(stages, "nsa", seed, arguments.out, [*arguments.words, *words], change=name)
        for seed in arguments.seeds
        for name, words in changes.items()
    ]
    commit, machine, failed = arguments.commit or _commit(), _machine(), 0
    for run in _ended(runs, arguments.at_once):
        result = run.result(commit, machine)
        with (arguments.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        failed += result["exit_code"] != 0
        print(_said(result), flush=True)
    return int(failed > 0)


def _stages(paths: Sequence[Path], out: Path) -> list[Path]:
    """The first as it is; of each other a file with all that the earlier ones say and it does not, in `out`."""
    stages, whole = [paths[0]], yaml.safe_load(paths[0].read_text())
    for path in paths[1:]:
        for section, keys in yaml.safe_load(path.read_text()).items():
            whole[section] = {**whole.get(section, {}), **keys}
        stages.append(out / path.name)
        stages[-1].write_text(yaml.safe_dump(whole, sort_keys=False))
    return stages


def _ended(runs: Sequence[Run], at_once: int) -> Iterator[Run]:
    """Each as it ends; all of them end with this process."""
    waiting, going = list(runs), []  # type: tuple[list[Run], list[Run]]
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                going.append(waiting.pop(0))
                going[-1].start()
            time.sleep(0.5)
            for run in [run for run in going if run.process and run.process.poll() is not None]:
                going.remove(run)
                waiting[:0] = run.next()
                yield run
    finally:
        for run in going:
            if run.process is not None:
                run.process.terminate()
                run.process.wait()


def _said(result: dict[str, Any]) -> str:
    loss = f"validation {result['validation'][-1][1]:.4f}" if result["validation"] else "no validation"
    tasks = result["tasks"][-1] if result["tasks"] else {}
    answers = "".join(f", {name} {task['accuracy']:.1%}" for name, task in tasks.items() if name != "step")
    speed = f", {result['tokens_per_s']:,.0f} tokens/s" if result["tokens_per_s"] else ""
    end = "" if result["exit_code"] == 0 else f" (exit code {result['exit_code']}: see its log)"
    return f"{result['attention']} seed {result['seed']}: {loss}{answers}{speed}, {result['seconds']:.0f} s{end}"


def _of_any_environment(command: Sequence[str]) -> str:
    return shlex.join(["python", *command[1:]])


def _configuration(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def _commit() -> str | None:
    return _told("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")


def _machine() -> dict[str, str]:
    about = {"processor": platform.processor() or platform.machine(), "system": platform.system()}
    gpus = _told("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {**about, "gpu": gpus.splitlines()[0]} if gpus else about


def _told(*command: str) -> str | None:
    """What a program says; None where it is not there, or has nothing to say."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
