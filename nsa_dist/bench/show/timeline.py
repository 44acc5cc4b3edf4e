"""A picture of one layer on one rank: what it computed, what was on the wire meanwhile, and where it waited."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nsa_dist.cp.trace import Span

_COLOURS = {
    "phi": "#a9cdec", "cmp": "#30638e", "select": "#5b9bd0", "slc": "#8cb369", "win": "#c5dca0", "delta": "#9a9cb3",
    "halo": "#edae49", "compressed": "#d1495b", "bitmap": "#4a4e69", "pages": "#8d6a9f", "raw": "#30638e",
}  # fmt: skip
_OTHER = "#c9cad6"
_LEAST = 0.01  # of the axis: narrower spans have no room for their name


def draw(spans: Sequence[Span], title: str, path: Path) -> None:
    """Forward above backward, each from its own zero. Waiting is hatched, in the lane of what computes."""
    phases = [phase for phase in ("forward", "backward") if any(span.phase == phase for span in spans)]
    figure = Figure(figsize=(13, 1.2 + 2.5 * len(phases)), layout="constrained")
    for axes, phase in zip(figure.subplots(len(phases), 1, squeeze=False)[:, 0], phases, strict=True):
        _draw_phase(axes, [span for span in spans if span.phase == phase], phase)
    kinds = list(dict.fromkeys(_base(span.kind) for span in spans))
    patches = [Patch(color=_COLOURS.get(kind, _OTHER), label=kind) for kind in kinds]
    patches.append(Patch(facecolor="white", edgecolor="#b00020", hatch="////", label="waiting"))
    figure.legend(handles=patches, loc="outside lower center", ncol=len(patches), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in as few lanes as hold them without an overlap, each in the first that is free."""
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: s.begin_s):
        free = next((lane for lane in found if lane[-1].end_s <= span.begin_s), None)
        if free is None:
            found.append(free := [])
        free.append(span)
    return found


def _draw_phase(axes: Axes, spans: list[Span], phase: str) -> None:
    start, stop = min(s.begin_s for s in spans), max(s.end_s for s in spans)
    rows = [("computing", [s for s in spans if s.what == "compute"])]
    rows += [("on the wire", lane) for lane in lanes([s for s in spans if s.what == "transfer"])]
    for y, (_, lane) in enumerate(rows):
        for span in lane:
            _draw_span(axes, span, y, start, stop)
    for span in spans:
        if span.what == "wait":
            box = ((span.begin_s - start) * 1e3, (span.end_s - span.begin_s) * 1e3)
            axes.broken_barh([box], (-0.4, 0.8), facecolor="none", edgecolor="#b00020", hatch="////", linewidth=0)
    axes.set_yticks([0, 1 + (len(rows) - 2) / 2], ["computing", "on the wire"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, (stop - start) * 1e3)
    axes.set_xlabel(f"ms of the {phase}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_span(axes: Axes, span: Span, y: int, start: float, stop: float) -> None:
    width = (span.end_s - span.begin_s) * 1e3
    left = (span.begin_s - start) * 1e3
    axes.broken_barh(
        [(left, width)], (y - 0.4, 0.8), facecolor=_COLOURS.get(_base(span.kind), _OTHER), edgecolor="white"
    )
    if span.end_s - span.begin_s > 3 * _LEAST * (stop - start):
        axes.text(left + width / 2, y, span.name, ha="center", va="center", fontsize=7, clip_on=True)


def _base(kind: str) -> str:
    """`pages.grad` travels in the colour of `pages`."""
    return kind.removesuffix(".grad")
