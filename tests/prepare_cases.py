"""Folders of runs that never took a step: what a run leaves there, made without one."""

import os
from pathlib import Path

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.prepare import prepare_output
from train_cases import small_config


def config(base: Path, **sections) -> TrainConfig:
    return small_config(base, "run", **sections)


def begun(base: Path, **sections) -> OutputDir:
    """A run that has packed its texts and has two checkpoints, the pictures and some events."""
    wanted = config(base, **sections)
    prepare_output(wanted)
    output = OutputDir(wanted.run.output_dir)
    digest = write_corpus(wanted.data, output.data)
    output.marker().changed(corpus=digest).write(output.root)
    for step in (2, 4):
        (output.make_checkpoint(step) / "weights").write_text("w")
        output.set_latest(step)
    output.metrics.write_text('{"kind": "train", "step": 4}\n')
    output.tensorboard.mkdir()
    (output.tensorboard / "events.out.tfevents.1").write_text("e")
    (output.root / "loss.png").write_text("p")
    return output


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below `folder`, links as where they point."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def overwriting(base: Path, **sections) -> TrainConfig:
    return config(base, **{**sections, "run": {**sections.get("run", {}), "overwrite": True}})


def put(folder: Path, names: list[str]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's {name}")
    return {name: (folder / name).read_bytes() for name in names}
