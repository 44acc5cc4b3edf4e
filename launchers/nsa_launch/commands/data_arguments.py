"""The words of `nsa-dist data`; what they ask for is imported only when they are used."""

import argparse
import os
import signal
import sys
from pathlib import Path

from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `data build` and `data check` to the command line."""
    data = commands.add_parser(
        "data",
        help="texts to tokens for training, once and for all",
        **help_words(
            "Token sets: texts cut into tokens once, in Megatron's indexed files, with what they are beside them.",
            "nsa-dist data build texts --out tokens/mine",
            "nsa-dist data check tokens/mine",
        ),
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    _register_build(actions)
    check = actions.add_parser(
        "check",
        help="read every byte of token sets and compare it",
        **help_words(
            "Whether the files of token sets are as they were written, by SHA-256. Exit codes: 0 they are, 2 not.",
            "nsa-dist data check tokens/mine tokens/others",
        ),
    )
    check.add_argument("prefixes", type=Path, nargs="+", metavar="PREFIX")
    check.set_defaults(command=_check)


def _register_build(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    build = actions.add_parser(
        "build",
        help="make a token set",
        **help_words(
            "Cut texts into tokens and write PREFIX.bin and PREFIX.idx, which Megatron's indexed datasets read, and "
            "PREFIX.json, which says what they are. A file is a document, or each of its lines with --json-key; a "
            "token ends each. Given again after it was stopped, the command goes on with what is not done. Exit codes: "
            "0 made, 2 refused, 130 stopped by Ctrl-C.",
            "nsa-dist data build texts --out tokens/mine",
            "nsa-dist data build a.jsonl b.jsonl --json-key text --tokenizer models/llama --out tokens/web --jobs 16",
        ),
    )
    build.add_argument("places", type=Path, nargs="+", metavar="FOLDER|FILE", help="texts in UTF-8, subfolders too")
    build.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="of the three files' names")
    build.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|DIR",
        help="bytes (default), or a folder with a tokenizer.json of Hugging Face's, which needs nsa-dist[tokens]",
    )
    build.add_argument("--end-of-document", metavar="TOKEN", help="of --tokenizer DIR; default: its eos_token")
    build.add_argument("--json-key", metavar="KEY", help="files are JSON lines, a document each: its text's key")
    build.add_argument("--pattern", default="*", metavar="GLOB", help="of file names below folders (default *)")
    build.add_argument(
        "--max-file-bytes",
        type=_positive,
        metavar="N",
        help="larger files of a folder are left out, which is said (default 67108864, none with --json-key)",
    )
    build.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: the cores there are)")
    build.set_defaults(command=_build)


def _build(arguments: argparse.Namespace) -> int:
    from nsa_dist.train.refused import Refused
    from nsa_launch.commands import data

    jobs = arguments.jobs or len(os.sched_getaffinity(0))
    try:
        data.build(arguments, jobs)
    except (Refused, OSError, RuntimeError) as error:
        return _said(error)
    except KeyboardInterrupt:
        print("nsa-dist: stopped; what is finished is kept, give the same command again to go on", file=sys.stderr)
        return exit_codes.stopped_by(signal.SIGINT)
    return exit_codes.OK


def _check(arguments: argparse.Namespace) -> int:
    from nsa_dist.train.refused import Refused
    from nsa_launch.commands import data

    try:
        for prefix in arguments.prefixes:
            data.check(prefix)
    except (Refused, OSError) as error:
        return _said(error)
    return exit_codes.OK


def _said(error: Exception) -> int:
    from nsa_dist.train.refused import Refused

    if isinstance(error, OSError):
        error = Refused(f"{error.filename or 'a file'}: {error.strerror}; make room or mend that, and give it again")
    print(f"nsa-dist: {error}", file=sys.stderr)
    return exit_codes.BAD_CONFIG if isinstance(error, Refused) else exit_codes.FAILED


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is none; give 1 or more")
    return number
