"""The words of `nsa-dist bench`; what they ask for is imported only when they are used."""

import argparse
import sys
from pathlib import Path

from nsa_kernels.bench import arguments as kernel_arguments
from nsa_launch import exit_codes
from nsa_launch.commands.words import help_words

_CP = """\
Measure context parallelism: one rank of many on one device, the others made up, or real ranks (--gpus, --ranks), which
are compared with one rank first. Figures go to OUT/cp.json, a table to OUT/cp.txt, pictures beside them. A mode that
fails, out of memory say, is a row that says so.

Exit codes: 0 measured, 1 a result differs from that of one rank, 2 refused.
"""
_CP_EXAMPLES = (
    "nsa-dist bench cp --out runs/cp              # a rank of 8 with 1M tokens in every mode, and memory as ranks grow",
    "nsa-dist bench cp --out runs/cp --trace      # ... and a timeline of one layer",
    "nsa-dist bench cp --gpus all --out runs/cp   # a rank on each GPU over NCCL",
    "nsa-dist bench cp --gpus all --everyday --out runs/cp   # ... with 2k to 131k tokens each, by every transport",
    "nsa-dist bench cp --ranks 2 --out runs/cp    # two ranks on one GPU (or CPU) over gloo",
)
_KERNELS_EXAMPLES = (
    "nsa-dist bench kernels --out runs/bench --jobs 8                     # the table of kernels/README.md",
    "nsa-dist bench kernels --out runs/bench --preset full --only 1024k   # of all sizes those of this length",
    "nsa-dist bench kernels --out runs/new --compare runs/bench/bench.json",
)
_DECODE = """\
Measure decoding: one layer, one new token for each of B sequences, from a cache with drawn contents. Each case is
compared with the reference first, then timed as a CUDA graph; beside it dense attention by PyTorch's kernels, the times
that NSA's and the dense cache's bytes take at this card's copy rate, and an empty graph of as many launches (floor).
Figures go to OUT/decode.json, a table to OUT/decode.txt. Without a GPU small sizes are checked and called. With --gpus
or --ranks the cache lies over ranks, its compressed rows replicated and then sharded: the time of a step, how many
exchanges it has and what of it they are, in OUT/decode-ranks.json, .txt.

Exit codes: 0 measured, 1 a result differs from the reference's, 2 refused.
"""
_DECODE_EXAMPLES = (
    "nsa-dist bench decode --out runs/decode",
    "nsa-dist bench decode --out runs/decode --batch 8 --tokens 65536,262144 --no-dense",
    "nsa-dist bench decode --out runs/decode --gpus all --batch 1,8 --tokens 1048576   # over ranks",
)

_GENERATE = """\
Measure a model from a long prompt on: seconds to read it, tokens/s behind it, alone and as a small batch, and the same
with dense attention in the same model, by PyTorch's kernels from a plain K/V cache. Both are checked against the
sequence as a whole first, then timed in turn. Weights are drawn, or an exported model's. Figures go to
OUT/generate.json, a table to OUT/generate.txt. Without a GPU sizes are tiny.

Exit codes: 0 measured, 1 a result differs, 2 refused.
"""
_GENERATE_EXAMPLES = (
    "nsa-dist bench generate --out runs/generate                     # 64k tokens, 0.95 billion weights, batch 1 and 8",
    "nsa-dist bench generate --out runs/generate --model models/mine --tokens 16384,65536",
)


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    bench = commands.add_parser(
        "bench",
        help="measure: context parallelism on this machine, or the kernels",
        **help_words("Measure on this machine.", "nsa-dist bench cp --out runs/cp"),
    )
    bench.set_defaults(command=lambda _: _help(bench))
    subjects = bench.add_subparsers(metavar="WHAT")
    cp = subjects.add_parser(
        "cp", help="context parallelism: one rank of many, or real ranks", **help_words(_CP, *_CP_EXAMPLES)
    )
    _cp_arguments(cp)
    decode = subjects.add_parser(
        "decode", help="decoding from a cache, beside dense attention", **help_words(_DECODE, *_DECODE_EXAMPLES)
    )
    _decode_arguments(decode)
    generate = subjects.add_parser(
        "generate",
        help="a model from a long prompt on, beside dense attention",
        **help_words(_GENERATE, *_GENERATE_EXAMPLES),
    )
    _generate_arguments(generate)
    kernels = subjects.add_parser(
        "kernels",
        help="the kernels on one GPU, checked, timed, and held to an earlier run",
        **help_words(kernel_arguments.DESCRIPTION, *_KERNELS_EXAMPLES),
    )
    kernel_arguments.add_arguments(kernels)
    kernels.set_defaults(command=_kernels)


def _cp_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--gpus", type=_all_or_number, metavar="all|N", help="a rank on each of N GPUs, over NCCL")
    parser.add_argument("--ranks", type=int, metavar="N", help="N ranks that share one device, over gloo")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--cp", type=int, default=8, metavar="P", help="size of the group one of whose ranks runs")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which one; 0 sees, and fetches, most")
    parser.add_argument("--tokens", type=_numbers, metavar="N,N", help="lengths of the whole sequence")
    parser.add_argument(
        "--head-groups",
        type=_numbers,
        metavar="N,N",
        help="kv heads travel in so many groups; each is timed; default 4, or 1 in short calls",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this text")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="runs after one to warm up; default 3, 2 for real ranks"
    )
    parser.add_argument("--budget-s", type=float, default=540.0, metavar="S", help="what does not fit is left out")
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="constants of the predictions; default: h200-8.yaml"
    )
    parser.add_argument("--no-memory-curve", action="store_true", help="one rank of many: leave the curve out")
    parser.add_argument("--no-training", action="store_true", help="real ranks: leave the training run out")
    parser.add_argument("--everyday", action="store_true", help="real ranks: few tokens a rank, by every transport")
    parser.add_argument("--trace", action="store_true", help="draw a timeline of one layer")
    parser.set_defaults(command=_cp)


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--gpus", type=_all_or_number, metavar="all|N", help="over N GPUs, by NCCL")
    parser.add_argument("--ranks", type=int, metavar="N", help="over N ranks that share one device, by gloo")
    parser.add_argument("--batch", type=_numbers, metavar="B,B", help="sequences; default 1,8,64")
    parser.add_argument("--tokens", type=_numbers, metavar="N,N", help="of each; default 4k, 16k, 64k, 256k, 1M")
    parser.add_argument("--heads", type=_numbers, metavar="Hq,Hkv,Dk,Dv", help="default 64,4,128,128")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this text")
    parser.add_argument("--budget-s", type=float, default=540.0, metavar="S", help="start no case after so long")
    parser.add_argument("--no-dense", action="store_true", help="leave dense attention out")
    parser.add_argument("--fp8", action="store_true", help="pages in e4m3; also how far that is from bf16")
    parser.add_argument(
        "--cmp-placement",
        choices=("replicated", "sharded"),
        help="of compressed rows over ranks; default: both in turn",
    )
    parser.set_defaults(command=_decode)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--model", type=Path, metavar="DIR", help="an exported model; default: drawn weights")
    parser.add_argument(
        "--sizes", type=_numbers, metavar="L,H,Hq,Hkv,D,F", help="of drawn weights; default 12,2048,64,4,128,5632"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--tokens", type=_numbers, metavar="N,N", help="of a prompt; default 65536")
    parser.add_argument("--batch", type=_numbers, metavar="B,B", help="prompts at once; default 1,8")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens behind each prompt; default 64")
    parser.add_argument("--budget-s", type=float, default=540.0, metavar="S", help="start no case after so long")
    parser.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from nsa_dist.bench.generate.run import GenerateRequest, run

    try:
        request = GenerateRequest(
            arguments.out, arguments.model, arguments.sizes, arguments.device, arguments.tokens, arguments.batch,
            arguments.new, arguments.budget_s,
        )  # fmt: skip
        return exit_codes.FAILED if run(request) else exit_codes.OK
    except ValueError as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG


def _decode(arguments: argparse.Namespace) -> int:
    from nsa_dist.bench.decode.run import DecodeRequest, run
    from nsa_launch.bench import decode_ranks
    from nsa_launch.bench.request import place_of

    try:
        place = place_of(arguments, decode_ranks.device_of(arguments.device))
        request = DecodeRequest(
            arguments.out, arguments.device, arguments.batch, arguments.tokens, arguments.heads, arguments.only,
            arguments.budget_s, not arguments.no_dense, arguments.fp8,
            decode_ranks.placements(arguments.cmp_placement, arguments.fp8, place),
        )  # fmt: skip
    except ValueError as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG
    failed = run(request) if place is None else decode_ranks.run(request, place)
    return exit_codes.FAILED if failed else exit_codes.OK


def _cp(arguments: argparse.Namespace) -> int:
    from nsa_launch.bench import command
    from nsa_launch.bench.request import Request

    try:
        return command.run(Request.of(arguments))
    except ValueError as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG


def _kernels(arguments: argparse.Namespace) -> int:
    from nsa_kernels.bench import run

    try:
        return run.run(arguments)
    except ValueError as error:
        print(f"nsa-dist: {error}", file=sys.stderr)
        return exit_codes.BAD_CONFIG


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return exit_codes.OK


def _all_or_number(text: str) -> int | None:
    """`all` is -1."""
    return -1 if text == "all" else int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))
