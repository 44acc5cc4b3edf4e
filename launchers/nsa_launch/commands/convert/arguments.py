"""The words of `nsa-dist convert`; what it asks for is imported only when it is used."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from nsa_dist.config import NSAConfig
from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        help="a dense Llama, Qwen 3 or GPT of Megatron-LM as a model of NSA layers",
        **help_words(
            "Write config.json, model.safetensors and train.yaml from a folder as Hugging Face has it, or from a "
            "torch_dist checkpoint of Megatron-LM. Each branch gets the dense keys and values, and the gates are open "
            "for the selected one, so that the logits are the dense model's while all blocks are selected. Both "
            "models are held in memory. Exit codes: 0 written, 2 refused.",
            "nsa-dist convert models/Llama-3.2-1B --to models/llama-nsa",
            "nsa-dist convert models/Qwen3-0.6B --to models/qwen-nsa --num-slc-blocks 32 --window-len 1024",
            "nsa-dist convert checkpoints/gpt --tokenizer models/Llama-3.2-1B --to models/gpt-nsa",
        ),
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="of config.json and *.safetensors, or what Megatron-LM's --save named"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--tokenizer",
        metavar="bytes|DIR",
        help="the model's: a folder with tokenizer.json, which is copied, or bytes; needed for a checkpoint of "
        "Megatron-LM (default: what is in a folder of Hugging Face's)",
    )
    parser.add_argument(
        "--end-of-document", metavar="TOKEN", help="of --tokenizer DIR, if not its eos_token: where texts end"
    )
    for field in fields(NSAConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default, metavar="N", help="as nsa.* (default %(default)s)")
    parser.add_argument("--compression", choices=["mlp", "mean"], default="mlp", help="phi (default mlp, near a mean)")
    parser.add_argument(
        "--gate-logit",
        type=float,
        default=14.0,
        metavar="X",
        help="of the selected branch, the others have its negative (default 14); smaller: they open sooner, and the "
        "logits are less exact",
    )
    parser.set_defaults(command=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from nsa_launch.commands.convert import command

    sizes = {field.name: getattr(arguments, field.name) for field in fields(NSAConfig)}
    given = [getattr(arguments, name) for name in ("compression", "gate_logit", "tokenizer", "end_of_document")]
    try:
        command.run(command.Request(arguments.folder, arguments.to, sizes, *given))
    except (ValueError, OSError) as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    return exit_codes.OK
