"""Draws docs/ranks-plans.svg and docs/ranks-fetch.svg: who holds which token, and how chosen blocks become pages.

Run: python docs/picture_ranks.py
"""

from pathlib import Path

RANKS, CHUNKS = 4, 8
COLOURS = ("#a9c7e8", "#f6c894", "#b5d9b0", "#d9b8dc")
CHOSEN, INK, PALE = "#f58518", "#2e3440", "#eceff4"


class Picture:
    """Lines of an SVG, on white so that it can be read on a dark page, too."""

    def __init__(self, width: int, height: int) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="13" fill="{INK}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def cell(self, x: float, y: float, width: float, text: str = "", colour: str = PALE, height: float = 26) -> None:
        """A box with its text in the middle."""
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}" stroke="white" stroke-width="2"/>'
        )
        self.text(x + width / 2, y + height / 2 + 4.5, text, "middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        if text:
            self.lines.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Downwards."""
        self.lines.append(f'<path d="M{x0} {y0}L{x1} {y1}" stroke="{INK}" stroke-width="1.3" fill="none"/>')
        self.lines.append(f'<path d="M{x1 - 4} {y1 - 7}L{x1} {y1}L{x1 + 4} {y1 - 7}" stroke="{INK}" fill="none"/>')

    def save(self, name: str) -> None:
        Path(__file__).with_name(name).write_text("\n".join([*self.lines, "</svg>"]) + "\n", encoding="utf-8")


def plans() -> None:
    """Both layouts over four ranks, and how many earlier chunks a rank's tokens can see."""
    picture, width, left = Picture(900, 236), 88, 110
    layouts = {"zigzag": [min(c, CHUNKS - 1 - c) for c in range(CHUNKS)], "contiguous": [c // 2 for c in range(CHUNKS)]}
    picture.text(left, 22, "the sequence, in 2P = 8 chunks, first token to the left")
    for row, (name, owners) in enumerate(layouts.items()):
        y = 34 + 106 * row
        picture.text(left - 10, y + 18, name, "end")
        for chunk, rank in enumerate(owners):
            picture.cell(left + width * chunk, y, width, f"rank {rank}", COLOURS[rank])
        seen = [sum(chunk + 0.5 for chunk, owner in enumerate(owners) if owner == rank) for rank in range(RANKS)]
        picture.text(left - 10, y + 58, "work of cmp", "end")
        for rank, work in enumerate(seen):
            x, bar = left + 176 * rank, 160 * work / (CHUNKS * 2 - 2)
            picture.cell(x, y + 42, bar, "", COLOURS[rank], 22)
            picture.text(x + bar + 6, y + 58, f"{work / (sum(seen) / RANKS):.2f}")
    picture.text(left, 230, "work: compressed blocks before a rank's tokens, against the mean of the ranks")
    picture.save("ranks-plans.svg")


def fetch() -> None:
    """Rank 1 of two chooses blocks of rank 0, the forced first one among them: bitmap, pages, table."""
    picture, size, left = Picture(960, 330), 62, 180
    owners, wanted = [0, 0, 0, 0, 1, 1, 1, 1], {0, 3}
    picture.text(left - 10, 38, "who holds block", "end")
    for block, owner in enumerate(owners):
        picture.cell(left + size * block, 20, size, f"{block}: r{owner}", COLOURS[owner])
    picture.text(left - 10, 92, "rank 1's queries chose", "end")
    for block in range(len(owners)):
        picture.cell(left + size * block, 74, size, "", CHOSEN if block in wanted | {4, 5, 6, 7} else PALE)
    picture.text(left + size * 8 + 14, 92, "one kv head, all queries together")
    picture.text(left - 10, 146, "bitmap, gathered", "end")
    for block in range(len(owners)):
        picture.cell(left + size * block, 128, size, str(int(block in wanted)), COLOURS[1] if block in wanted else PALE)
    picture.text(left + size * 8 + 14, 146, "1: chosen, and held elsewhere")
    for page, block in enumerate(sorted(wanted)):
        picture.arrow(left + size * (block + 0.5), 156, left + 140 * (page + 0.5), 190)
        picture.cell(left + 140 * page, 192, 140, f"page {page} = block {block}", COLOURS[0])
    picture.text(left - 10, 210, "rank 0 sends", "end")
    picture.text(left + 290, 210, "64 keys and values each, set bits in ascending order")
    picture.text(left - 10, 264, "block_table of rank 1", "end")
    places = ["page 0", "-", "-", "page 1", "own 0", "own 1", "own 2", "own 3"]
    for block, place in enumerate(places):
        colour = PALE if place == "-" else COLOURS[0] if place.startswith("page") else COLOURS[1]
        picture.cell(left + size * block, 246, size, place, colour)
    picture.text(left + size * 8 + 14, 264, "where the kernel reads a block")
    picture.text(left, 312, "in backward gradients of the pages go back to rank 0 the same way, in fp32")
    picture.save("ranks-fetch.svg")


if __name__ == "__main__":
    plans()
    fetch()
