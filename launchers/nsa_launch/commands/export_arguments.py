"""The words of `nsa-dist export` and `nsa-dist generate`; what they ask for is imported only when they are used."""

import argparse
import sys
from pathlib import Path

from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words

_TOKENIZER = "of a run on such tokens: the folder that data build was given"


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to the command line."""
    _register_export(commands)
    _register_generate(commands)


def _register_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="a run's model as a folder that plain PyTorch reads",
        **help_words(
            "Write config.json, model.safetensors and the tokenizer from a checkpoint of a run, whatever ranks it was "
            "trained on. Its files are compared with their digests first; nothing of the run is changed. Exit codes: 0 "
            "written, 2 refused.",
            "nsa-dist export runs/first --to models/first",
            "nsa-dist export runs/first --to models/first-60 --step 60",
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--step", type=int, metavar="N", help="of this checkpoint; default: the newest intact one")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=_TOKENIZER)
    parser.set_defaults(command=_export)


def _register_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        help="let a trained model go on with texts",
        **help_words(
            "Go on with one or more prompts, from a run's folder or an exported one, as the tokens come. Several go "
            "through the model together; the first is shown as it comes, the others when it is done. Exit codes: 0 "
            "done, 2 refused.",
            "nsa-dist generate runs/first --prompt 'def main(' --max-new-tokens 200",
            "nsa-dist generate models/first --prompt 'import ' --prompt 'class ' --temperature 0.7 --seed 1",
        ),
    )
    parser.add_argument("model", type=Path, metavar="RUN_OR_DIR", help="a run's folder, or one that export wrote")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; default: none")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="for each prompt (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="likeliest tokens only (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda or cuda:1")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=_TOKENIZER)
    parser.set_defaults(command=_generate)


def _export(arguments: argparse.Namespace) -> int:
    from nsa_launch.commands import export

    try:
        export.run(arguments.run, arguments.to, arguments.step, arguments.tokenizer)
    except (ValueError, OSError) as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    return exit_codes.OK


def _generate(arguments: argparse.Namespace) -> int:
    from nsa_launch.commands import generate

    try:
        generate.run(generate.Request.of(arguments))
    except (ValueError, OSError) as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    return exit_codes.OK
