"""Two pictures of a finished run: its losses, and a map of the blocks that were selected."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from nsa_dist.config import NSAConfig
from nsa_dist.train.files.records import Record

# The states of a (query, block) pair in the map, with their colours.
FUTURE, VISIBLE, CHOSEN, FORCED = range(4)
_COLOURS = ("#ffffff", "#e4e8ee", "#d1495b", "#30638e")
_LABELS = ("after the query", "visible, not selected", "selected by importance", "selected always (first, local)")
_MAX_PIXELS = 1024  # rows and columns of the map; longer sequences are thinned out


def plot_losses(train: Sequence[Record], validation: Sequence[Record], vocab_size: int, unit: str, path: Path) -> None:
    """Training and validation loss by step in `unit`, with the loss of guessing uniformly for scale."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.8, color="#8fb3d9", label="training")
    axes.plot(
        [r["step"] for r in validation], [r["loss"] for r in validation], "o-", color="#d1495b", label="validation"
    )
    axes.axhline(math.log(vocab_size), ls=":", color="gray", label=f"uniform guess, ln {vocab_size}")
    if validation:
        last = validation[-1]
        axes.annotate(f"{last['loss']:.3f}", (last["step"], last["loss"]), xytext=(0, -30),
                      textcoords="offset points", ha="right", color="#d1495b")  # fmt: skip
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title="Training and validation loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_selection(block_indices: Tensor, config: NSAConfig, where: str, path: Path) -> None:
    """The map of `selection_map`; `where` names layer, head and sequence in the title."""
    num_tokens = block_indices.shape[0]
    picture = selection_map(block_indices, config)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    num_blocks = -(-num_tokens // config.slc_block_len)
    axes.imshow(
        picture, cmap=ListedColormap(_COLOURS), vmin=FUTURE, vmax=FORCED, aspect="auto", interpolation="nearest",
        extent=(-0.5, num_blocks - 0.5, num_tokens, 0),
    )  # fmt: skip
    axes.set(
        xlabel=f"selection block ({config.slc_block_len} tokens each)",
        ylabel="query position (tokens)",
        title=f"Blocks selected, {config.num_slc_blocks} a query: {where}",
    )
    patches = [Patch(facecolor=c, edgecolor="gray", label=name) for c, name in zip(_COLOURS, _LABELS, strict=True)]
    axes.legend(handles=patches[1:], loc="upper right", framealpha=1)
    figure.savefig(path, dpi=150)


def selection_map(block_indices: Tensor, config: NSAConfig) -> Tensor:
    """int32 [N, n] of one document -> uint8 [rows, columns] of FUTURE, VISIBLE, CHOSEN, FORCED.

    A long sequence is thinned out: every k-th query, and runs of neighbouring blocks as one column, which shows the
    strongest state in it.
    """
    num_tokens = block_indices.shape[0]
    query = torch.arange(0, num_tokens, -(-num_tokens // _MAX_PIXELS))
    num_blocks = -(-num_tokens // config.slc_block_len)
    per_column = -(-num_blocks // _MAX_PIXELS)
    own = (query // config.slc_block_len)[:, None]
    chosen = block_indices[query].long()  # [rows, n]
    forced = (chosen < config.num_init_blocks) | (chosen > own - config.num_local_blocks)
    column = torch.arange(-(-num_blocks // per_column))
    picture = torch.where(column <= own // per_column, VISIBLE, FUTURE)
    state = torch.where(forced, FORCED, CHOSEN).masked_fill(chosen < 0, FUTURE)
    return picture.scatter_reduce(1, chosen.clamp(min=0) // per_column, state, "amax").to(torch.uint8)
