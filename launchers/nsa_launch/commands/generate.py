"""`nsa-dist generate`: texts that a model goes on with."""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from nsa_dist.inference.folder import CONFIG, load_model
from nsa_dist.inference.generate import Piece, Sampling, generate
from nsa_dist.inference.model import GPT
from nsa_dist.inference.text import Stream, Tokenizer, tokenizer_of
from nsa_dist.train.files.marker import NAME
from nsa_dist.train.refused import Refused
from nsa_launch.commands.export import quiet


class Request(NamedTuple):
    """What was asked for on the command line."""

    model: Path
    prompts: list[str]
    max_new_tokens: int
    sampling: Sampling
    device: str
    tokenizer: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Request":
        sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
        return cls(
            arguments.model, arguments.prompt or [""], arguments.max_new_tokens, sampling, arguments.device,
            arguments.tokenizer,
        )  # fmt: skip


def run(request: Request) -> None:
    """Print what the model says, and how fast it was to standard error."""
    request.sampling.check()
    model, tokenizer = _load(request.model, _device(request.device), request.tokenizer)
    prompts = [tokenizer.encode(prompt) for prompt in request.prompts]
    started = time.perf_counter()
    pieces = generate(model, prompts, request.max_new_tokens, request.sampling)
    count = _show(request.prompts, [tokenizer.stream(prompt) for prompt in prompts], pieces, sys.stdout)
    seconds = time.perf_counter() - started
    print(f"{count} tokens in {seconds:.1f} s: {count / seconds:.0f} tokens/s", file=sys.stderr)


def _show(prompts: list[str], streams: list[Stream], pieces: Iterable[Piece], out: TextIO) -> int:
    """The first prompt's text as it comes, the others' behind it; how many tokens there were."""
    texts = list(prompts)
    out.write(_heading(0, prompts) + prompts[0])
    count = 0
    for prompt, token in pieces:
        text = streams[prompt].add(token)
        count += 1
        if prompt == 0:
            out.write(text)
            out.flush()
        else:
            texts[prompt] += text
    for index, stream in enumerate(streams):
        rest = stream.rest()
        out.write(rest + "\n" if index == 0 else _heading(index, prompts) + texts[index] + rest + "\n")
    out.flush()
    return count


def _heading(index: int, prompts: list[str]) -> str:
    return f"--- {index + 1} of {len(prompts)} ---\n" if len(prompts) > 1 else ""


def _load(folder: Path, device: torch.device, tokenizer: Path | None) -> tuple[GPT, Tokenizer]:
    if (folder / CONFIG).is_file():
        if tokenizer is not None:
            raise Refused(
                f"--tokenizer {tokenizer} was given, but {folder} is an exported model with a tokenizer of its own, "
                f"which that might not be; leave it out, or export the run again with it"
            )
        model = load_model(folder, device)
        return model, tokenizer_of(model.config.tokenizer, folder)
    if not (folder / NAME).is_file():
        raise Refused(
            f"{folder} has neither {CONFIG} nor {NAME}, so it is no exported model and no run; give a folder that "
            f"nsa-dist export wrote, or the output_dir of a run"
        )
    with quiet():
        from nsa_dist.train.export.run import plain_model

        model, chosen = plain_model(folder)
        from nsa_dist.train.export.tokenizer import tokenizer_files

        tokenizer_files(folder, tokenizer)  # refused if it is another run's
    for notice in chosen.notices:
        print(f"nsa-dist: {notice}", file=sys.stderr)
    return model.to(device), tokenizer_of(model.config.tokenizer, tokenizer)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refused(f"--device {name} is no device; give cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused(f"--device {name} was given, but PyTorch sees no GPU here; leave it out for the CPU")
    return device
