"""Who may start in a run's folder, and as what: a new run, the old one going on, or a new one in its place.

A run is told by its marker (`run.json`). Everything is judged before anything is written, and what is refused leaves
the folder as it was. The launchers call `prepare_output` before they start a process; `train` calls it once more.
"""

import os
from collections.abc import Sequence
from typing import Any

from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.corpus import check_packed, check_texts, digest_of, splits_of
from nsa_dist.train.files import replace
from nsa_dist.train.files.candidates import ANY_CHECKPOINT, refusal
from nsa_dist.train.files.marker import NAME, RunMarker, containers, found, remove
from nsa_dist.train.files.output import MADE, OutputDir
from nsa_dist.train.files.places import check_writable, expanded, is_folder
from nsa_dist.train.identity import FIXED, OF_TEXTS, changes, differences, identity, settings
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens import sets


def prepare_output(config: TrainConfig, made: Sequence[str] = MADE) -> None:
    """Make `output_dir` ready for a run that will make the files `made` there. One process calls it, before the others.

    ValueError as `check_output`, and for a corpus in `data/` that is not the one that the run was begun with.
    """
    output, run = OutputDir(config.run.output_dir), config.run
    check_output(config, made)
    output.root.mkdir(parents=True, exist_ok=True)
    replace.finish_moving(output.root)
    marker = RunMarker.read(output.root)
    if marker is not None and run.overwrite:
        replace.set_aside(output.root, marker)
        marker = None
    if marker is None:
        _check_unused(output, [*made, ANY_CHECKPOINT])  # what a crash left is out of the way by now
        RunMarker.new(made, identity(config), settings(config)).write(output.root)
    else:
        if _never_ran(output, marker) and (config.data.token_sets or differences(marker.identity, config)):
            marker = _become(output, marker, config)
        _check_corpus(output, marker, config)
        marker.changed(made=tuple(dict.fromkeys([*marker.made, *made]))).write(output.root)
    replace.remove_replaced(output.root)


def check_output(config: TrainConfig, made: Sequence[str] = MADE) -> None:
    """ValueError if `config` cannot start in its `output_dir`: nothing is changed there.

    It is no folder for a run; it holds files of no run; it holds a run and nothing says what to do with it; it holds
    another run than the one to go on with; or overwriting would have to remove what lies elsewhere.
    """
    output = OutputDir(config.run.output_dir)
    _check_places(config, output, made)
    marker = RunMarker.read(output.root)
    if marker is None:
        if not replace.is_going(output.root):  # else what is there belongs to a run on its way out
            _check_unused(output, [*made, ANY_CHECKPOINT])
        _check_texts(config)
        return
    _check_unused(output, [*made, ANY_CHECKPOINT], marker, config.run.resume)
    if config.run.overwrite or _never_ran(output, marker):
        replace.check_replaceable(output.root, marker if config.run.overwrite else _packed(marker))
        _check_texts(config)
    elif config.run.resume:
        _check_same_run(output, marker, config)
        _check_checkpoint(output, config)
    else:
        raise Refused(
            f"output_dir={output.root} already holds a run ({NAME}), which a new one would mix with; set resume=true "
            f"to go on with it, overwrite=true to replace it, or another output_dir"
        )


def note_settings(output: OutputDir, config: TrainConfig) -> dict[str, list[Any]]:
    """{key: [old, new]} of what the last start had otherwise, and `run.json` has as it is now."""
    marker = output.marker()
    new = differences(marker.identity, config)  # allowed: the same texts by another name
    changed = {**{key: list(pair) for key, pair in new.items()}, **changes(marker.settings, config)}
    if changed:
        marker.changed(identity=identity(config), settings={**marker.settings, **settings(config)}).write(output.root)
    return changed


def _never_ran(output: OutputDir, marker: RunMarker) -> bool:
    """Begun, and not a record written: such a start failed, and the next one may be another run."""
    ran = output.latest.exists() or output.metrics.exists()
    return not ran and not any(name.startswith("checkpoints/") for name in marker.made)


def _become(output: OutputDir, marker: RunMarker, config: TrainConfig) -> RunMarker:
    """A run that never ran begins as `config` says, without the texts that it had packed; its logs stay."""
    for path in found(output.root, _packed(marker).made):  # corpus.json first: without it they are not a corpus
        remove(path)
    return marker.changed(identity=identity(config), settings=settings(config), corpus="").write(output.root)


def _packed(marker: RunMarker) -> RunMarker:
    return marker.changed(made=tuple(name for name in marker.made if name.startswith("data/")))


def _check_places(config: TrainConfig, output: OutputDir, made: Sequence[str]) -> None:
    root, texts = output.root, config.data.folder
    check_writable("output_dir", root)
    for name in containers([*made, ANY_CHECKPOINT]):
        if os.path.lexists(root / name) and not (root / name).is_dir():
            raise Refused(
                f"{root / name} is not a folder, and the run's {name} go there; move it away, or take another "
                f"output_dir"
            )
    if texts is None:
        return
    own = [root, *(root / name for name in containers([*made, ANY_CHECKPOINT]))]
    inside = expanded("data.folder", texts).resolve()
    if any(inside == place.resolve() or (place != root and place.resolve() in inside.parents) for place in own):
        raise Refused(
            f"data.folder={texts} lies where the run in output_dir={root} keeps its own files, which would become its "
            f"texts; take another output_dir, or move the texts to a folder beside it"
        )


def _check_unused(
    output: OutputDir, made: Sequence[str], marker: RunMarker | None = None, resume: bool = False
) -> None:
    """ValueError if a file is there that a run would take for its own or overwrite, and that is not of `marker`'s run.

    One that goes on comes to no checkpoint before its last.
    """
    own = set(found(output.root, marker.made)) if marker is not None else set()
    if resume:
        own |= {
            path
            for path in found(output.root, [ANY_CHECKPOINT])
            if path <= output.checkpoint(output.checkpointed_step())
        }
    held = [path.relative_to(output.root).as_posix() for path in found(output.root, made) if path not in own]
    if not held:
        return
    if "latest.json" in held:
        raise Refused(
            f"output_dir={output.root} holds a run without {NAME}, which was lost, or its version ordered samples "
            f"otherwise and wrote down neither what the run was nor what it made, so it can be neither continued nor "
            f"replaced; put {NAME} back from a copy, take another output_dir, or remove that folder yourself"
        )
    shown = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
    raise Refused(
        f"output_dir={output.root} has {shown}, which a run would overwrite, and {NAME} does not say that a run made "
        f"them; move them away, or take another output_dir"
    )


def _check_texts(config: TrainConfig) -> None:
    """What a run begins with: its texts or tokens, and the weights of `run.start_from`."""
    data = config.data
    if config.run.start_from is not None:
        from nsa_dist.train.export import start  # which needs Megatron-core; others are checked without it

        start.check(config)
    if data.token_sets:
        sets.check(data, config.run.sequence_length)
        sets.padded_vocab_size(config)
        return
    if data.folder is not None:
        folder = expanded("data.folder", data.folder)
        if not is_folder(folder):
            raise Refused(f"data.folder={folder} is not a folder, and the texts of the run come from it; name another")
        data = data.model_copy(update={"folder": folder})
    check_texts(data, config.run.sequence_length, but_not=config.run.output_dir)


def _check_same_run(output: OutputDir, marker: RunMarker, config: TrainConfig) -> None:
    found_otherwise = differences(marker.identity, config)
    if found_otherwise and found_otherwise.keys() <= OF_TEXTS and _same_texts(marker, config):
        return
    if found_otherwise:
        lines = [
            f"  {key}: the run has {_text(was)}, given is {_text(now)}; {FIXED[key]}"
            for key, (was, now) in found_otherwise.items()
        ]
        raise Refused(
            f"output_dir={output.root} holds a run that was begun with other values, and going on with these would be "
            f"another run under its name:\n" + "\n".join(lines) + "\n"
            f"give the old values ({output.root / 'config.yaml'} has them), or start a new run in another output_dir"
        )


def _same_texts(marker: RunMarker, config: TrainConfig) -> bool:
    """Whether the texts that `config` names would make the corpus that the run has."""
    try:
        if config.data.token_sets:
            return sets.digest_of(config.data) == marker.corpus
        return digest_of(splits_of(config.data, but_not=config.run.output_dir)) == marker.corpus
    except Refused:  # no two files: no corpus at all
        return False


def _check_corpus(output: OutputDir, marker: RunMarker, config: TrainConfig) -> None:
    if config.data.token_sets:
        sets.padded_vocab_size(config)
        if marker.corpus and sets.digest_of(config.data) != marker.corpus:
            raise Refused(
                f"data.tokens={config.data.tokens} holds other tokens than those that the run in {output.root} was "
                f"begun with, so other samples would follow; put them back, or start a new run in another output_dir"
            )
        return
    if marker.corpus and not check_packed(output.data, marker.corpus) and not _same_texts(marker, config):
        raise Refused(
            f"{output.data} no longer holds the corpus of the run, and data.folder={config.data.folder} has other "
            f"texts than those it was made of, so other samples would follow; put one of them back, or start a new run "
            f"in another output_dir"
        )


def _check_checkpoint(output: OutputDir, config: TrainConfig) -> None:
    """By names and sizes; `nsa_dist.train.files.intact` reads the files, when all ranks are there to share them."""
    seen = output.candidates()
    done, nothing = seen.newest, refusal(output.root, seen, seen.damaged)
    if not done and nothing:
        raise Refused(nothing)
    if done > config.run.steps:
        raise Refused(
            f"steps={config.run.steps} is below the {done} steps that the run in {output.root} has made, and none is "
            f"taken back; take steps={done} or more"
        )


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
