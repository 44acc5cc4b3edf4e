"""The tokenizer of a run's tokens: the run has their numbers and its digest, a folder has the file."""

import hashlib
from pathlib import Path

from nsa_dist.convert.tokenizer import files_of
from nsa_dist.inference.text import TOKENIZER
from nsa_dist.train.export.run import config_of
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.sets import read_all


def tokenizer_files(run: Path, folder: Path | None) -> dict[str, bytes]:
    """What an exported folder of the run is to hold of `folder`; nothing for bytes, whose files need none.

    Refused unless the folder is that of the run's tokens, by the SHA-256 of its tokenizer.json.
    """
    data = config_of(OutputDir(run)).data
    about = read_all(data)[0].tokenizer if data.token_sets else {"kind": "bytes"}
    if about["kind"] != "huggingface":
        if folder is not None:
            raise Refused(
                f"--tokenizer {folder} was given, but the tokens of {run} are {about['kind']}, which need no folder; "
                f"leave it out"
            )
        return {}
    if folder is None or not (folder / TOKENIZER).is_file():
        raise Refused(
            f"the tokens of {run} are those of a tokenizer, and {folder or 'nothing'} was given with its {TOKENIZER} "
            f"(SHA-256 {about['sha256'][:12]}...): the run has the numbers alone; give --tokenizer DIR, the folder "
            f"that nsa-dist data build was given"
        )
    files = files_of(folder, about["end_of_document"])
    digest = hashlib.sha256(files[TOKENIZER]).hexdigest()
    if digest != about["sha256"]:
        raise Refused(
            f"{folder / TOKENIZER} has SHA-256 {digest[:12]}..., and the tokens of {run} were built with "
            f"{about['sha256'][:12]}..., so one number would be two tokens; give the folder as it was then"
        )
    return files
