"""Draws docs/nsa.png: what one query sees, and what moves between ranks. Run: python docs/picture.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

CMP, SLC, WIN, NONE, INK = "#4c78a8", "#f58518", "#54a24b", "#eceff4", "#2e3440"
RANK_COLOURS = ("#dbe7f3", "#fbe6d0", "#ddeedd", "#efe0ef")
BLOCKS, OWN = 24, 21  # selection blocks drawn; the query's own
CHOSEN = (0, 5, 6, 13, 20, 21)


def cell(ax: Axes, x: float, y: float, width: float, colour: str, height: float = 0.7) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.2))


def draw_query(ax: Axes) -> None:
    for x in range(BLOCKS):
        owner = min(x, BLOCKS - 1 - x) // 3  # zigzag over 4 ranks: 8 chunks of 3 blocks
        cell(ax, x, 3.5, 1, RANK_COLOURS[owner], 0.5)
        if x % 3 == 1:
            ax.text(x + 0.5, 3.75, f"rank {owner}", ha="center", va="center", fontsize=8, color=INK)
        cell(ax, x, 1.2, 1, SLC if x in CHOSEN else NONE)
        cell(ax, x, 0.1, 1, NONE)
    for x in range(4 * BLOCKS):
        cell(ax, x / 4, 2.3, 0.25, CMP if x < 4 * OWN + 1 else NONE)
    cell(ax, OWN + 0.6 - 3, 0.1, 3, WIN)
    ax.plot([OWN + 0.6] * 2, [-0.1, 3.4], color=INK, linewidth=1.5)
    ax.text(OWN + 0.6, -0.15, "query", ha="center", va="top", fontsize=9, color=INK)
    for y, label in (
        (3.75, "who holds it (zigzag)"),
        (2.65, "cmp: summaries of all"),
        (1.55, "slc: top-n in full"),
        (0.45, "win: the last w tokens"),
    ):
        ax.text(-0.3, y, label, ha="right", va="center", fontsize=9, color=INK)
    ax.set(xlim=(-7.2, BLOCKS + 0.3), ylim=(-0.7, 4.3))
    ax.axis("off")


def box(ax: Axes, x: float, y: float, text: str, colour: str, width: float = 3.9) -> None:
    ax.add_patch(Rectangle((x, y), width, 0.8, facecolor=colour, edgecolor=INK, linewidth=1))
    ax.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(ax: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.1))


def draw_flow(ax: Axes) -> None:
    rows = (
        (
            2.6,
            CMP,
            (
                "left halo\n(l - d rows)",
                "phi: compress\nown blocks",
                "all-gather\ncompressed K, V",
                "cmp attention\n+ global top-n",
            ),
        ),
        (
            1.3,
            SLC,
            ("bitmap of\nchosen blocks", "all-to-all of\nchosen pages only", "slc attention\nthrough block_table"),
        ),
        (0.0, WIN, ("left halo\n(w - 1 rows)", "window attention")),
    )
    for y, colour, names in rows:
        offset = 4 - len(names)
        for i, name in enumerate(names):
            box(ax, 5 * (i + offset), y, name, colour + "55")
            if i:
                arrow(ax, (5 * (i + offset) - 1.1, y + 0.4), (5 * (i + offset), y + 0.4))
    arrow(ax, (16, 2.6), (7.5, 2.1))
    box(ax, 20, 1.3, "gates: sum of the\nthree outputs", NONE)
    for y in (3.0, 1.7, 0.4):
        arrow(ax, (18.9, y), (20, 1.7))
    ax.set(xlim=(-0.3, 24.3), ylim=(-0.2, 3.6))
    ax.axis("off")


def main() -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 5.6), height_ratios=(1.15, 1))
    draw_query(top)
    draw_flow(bottom)
    top.set_title("What one query sees", loc="left", fontsize=11, color=INK)
    bottom.set_title("What one rank does", loc="left", fontsize=11, color=INK)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("nsa.png"), dpi=110)


if __name__ == "__main__":
    main()
