"""`nsa-dist convert`: a dense model's folder as one of NSA layers, and a run that trains it on."""

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from nsa_dist.config import NSAConfig
from nsa_dist.convert.dense import DenseModel, read_dense
from nsa_dist.convert.megatron.files import is_megatron
from nsa_dist.convert.megatron.weights import read_megatron
from nsa_dist.convert.nsa import converted
from nsa_dist.convert.tokenizer import files_of
from nsa_dist.inference.folder import save_model
from nsa_dist.inference.model import GPTConfig
from nsa_dist.inference.text import TOKENIZER
from nsa_dist.train.refused import Refused
from nsa_dist.train.tokens.tokenizers import BYTES, Tokenizer, opened

TRAIN = "train.yaml"


class Request(NamedTuple):
    """What was asked for on the command line."""

    folder: Path
    to: Path
    sizes: dict[str, int]  # of NSAConfig
    compression: Literal["mlp", "mean"]
    gate_logit: float
    tokenizer: str | None  # the word bytes, or a folder
    end_of_document: str | None  # a token of that folder's


def run(request: Request) -> None:
    """Write the model into `request.to`, and a file for `nsa-dist train`. Refused if that holds something already."""
    to = request.to
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refused(f"--to {to} is there and not empty, and nothing is overwritten; name a new folder, or empty it")
    dense, tokenizer = _dense(request)
    model = converted(dense, NSAConfig(**request.sizes), compression=request.compression, gate_logit=request.gate_logit)
    save_model(model, to, tokenizer)
    (to / TRAIN).write_text(_run_of(model.config, to), encoding="utf-8")
    count = sum(x.numel() for x in model.parameters())
    print(f"{to}: {count:,} weights, {model.config.dtype}; {to / TRAIN} trains them on")
    sizes = model.config.nsa
    print(f"the logits are the dense model's up to {sizes.num_slc_blocks * sizes.slc_block_len} tokens")
    if dense.not_read:
        print(f"not read of {request.folder}: {', '.join(dense.not_read)}")


def _dense(request: Request) -> tuple[DenseModel, dict[str, bytes]]:
    """The dense model, and the files of its tokenizer. Refused for a tokenizer of more tokens than it has rows."""
    folder, tokenizer = request.folder, _tokenizer(request)
    if is_megatron(folder):
        if tokenizer is None:
            raise Refused(
                f"{folder} is a checkpoint of Megatron-LM, which has the numbers of tokens alone, and no --tokenizer "
                f"was given: it says what a row of the embedding stands for, and which token ends a document; give "
                f"--tokenizer DIR, a folder with {TOKENIZER}, or --tokenizer bytes"
            )
        dense = read_megatron(folder, tokenizer.about["kind"], tokenizer.end_of_document)
    else:
        dense = read_dense(folder)
    if tokenizer is None:
        return dense, files_of(folder, None) if (folder / TOKENIZER).is_file() else {}
    if tokenizer.vocab_size > dense.vocab_size:
        raise Refused(
            f"--tokenizer {request.tokenizer} has {tokenizer.vocab_size} tokens, and the model {dense.vocab_size} rows "
            f"for them, so it is another model's; give the one that the model was trained with"
        )
    dense = dense._replace(tokenizer=tokenizer.about["kind"], end_of_document=tokenizer.end_of_document)
    if request.tokenizer in (None, BYTES):
        return dense, {}
    return dense, files_of(Path(request.tokenizer).expanduser(), tokenizer.about["end_of_document"])


def _tokenizer(request: Request) -> Tokenizer | None:
    if request.tokenizer is None and request.end_of_document is not None:
        raise Refused(
            f"--end-of-document {request.end_of_document} was given without --tokenizer, whose token it is; give "
            f"--tokenizer DIR, too, or leave it out"
        )
    return None if request.tokenizer is None else opened(request.tokenizer, request.end_of_document)


def _run_of(config: GPTConfig, to: Path) -> str:
    """The sections that a run from this folder needs. Where its tokens are is left to say."""
    nsa: dict[str, Any] = {field.name: getattr(config.nsa, field.name) for field in fields(NSAConfig)}
    nsa |= {"compression": config.compression, "rotary_base": config.rotary_base, "gate_bias": True}
    if config.rope_scaling is not None:
        nsa["rope_scaling"] = config.rope_scaling
    if config.rotary_percent != 1:
        nsa["rotary_percent"] = config.rotary_percent
    model = {
        "num_layers": config.num_layers, "hidden_size": config.hidden_size, "num_attention_heads": config.num_q_heads,
        "num_query_groups": config.num_kv_heads, "head_dim": config.head_dim,
        "ffn_hidden_size": config.ffn_hidden_size, "tie_embeddings": config.tie_embeddings,
        "norm_eps": config.norm_eps, "qk_norm": config.qk_norm,
    }  # fmt: skip
    place = to.absolute()
    sections = {
        "run": {"output_dir": f"runs/{place.name}", "start_from": str(place), "dtype": config.dtype},
        "model": model,
        "nsa": nsa,
    }
    named = {
        "huggingface": "Name the tokens that the model's own tokenizer made (nsa-dist data build\n# --tokenizer DIR), "
        "and what else a run needs: nsa-dist train train.yaml data.tokens=PREFIX run.steps=1000\n",
        "bytes": "A token is a byte. Name the texts, and what else a run needs:\n"
        "# nsa-dist train train.yaml data.folder=FOLDER run.steps=1000\n",
    }
    return f"# Of nsa-dist convert. {named[config.tokenizer]}" + yaml.safe_dump(sections, sort_keys=False)
