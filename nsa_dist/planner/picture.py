"""One picture of a plan: what fills a GPU, how long a step takes, where its time goes, what moving K/V adds to it."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nsa_dist.planner.core.strategies import GIB
from nsa_dist.planner.sweep import Outcome, Plan

# Kinds of memory, bottom to top: what does not shrink with cp first, in greys.
_MEMORY = {
    "weights": ("#4a4e69", "weights"),
    "gradients": ("#6c7089", "gradients"),
    "optimizer": ("#9a9cb3", "optimizer states"),
    "reserved": ("#c9cad6", "CUDA, NCCL"),
    "activations": ("#30638e", "activations saved"),
    "kv": ("#5b9bd0", "K/V saved"),
    "compressed": ("#a9cdec", "compressed K/V"),
    "pages": ("#d1495b", "fetched pages"),
    "mailboxes": ("#e08a5f", "mailboxes"),
    "logits": ("#edae49", "logits"),
    "transient": ("#8cb369", "working memory of one layer"),
}
_TIME = {
    "cmp": ("#30638e", "compressed branch"),
    "select": ("#5b9bd0", "choosing blocks"),
    "slc": ("#8cb369", "selected branch"),
    "win": ("#c5dca0", "window branch"),
    "phi": ("#a9cdec", "compression"),
    "dense": ("#9a9cb3", "linear layers"),
    "elementwise": ("#c9cad6", "norms, rotary, SwiGLU"),
    "optimizer": ("#4a4e69", "optimizer"),
    "merge": ("#edae49", "merging rounds"),
    "wire": ("#d1495b", "wire"),
}
_LINES = {
    "whole shard": ("#8d6a9f", "s"),
    "all-gather": ("#30638e", "D"),
    "ring": ("#8cb369", "^"),
    "raw all-gather": ("#4a4e69", "v"),
    "shared all-gather": ("#9a9cb3", "o"),
}
_FETCHES = ("#d1495b", "#e08a5f", "#edae49", "#f2cc8f")
_ALIKE = 1.05  # lines closer than this cannot be told apart


def draw(plan: Plan, title: str, path: Path) -> None:
    """Write the picture; the format follows the path's ending."""
    figure = Figure(figsize=(14, 10.5), layout="constrained")
    (memory, time), (parts, moving) = figure.subplots(2, 2)
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    _draw_parts(parts, plan)
    _draw_moving(moving, plan)
    for axes in (memory, time, parts, moving):
        axes.set_xticks(range(len(plan.candidates)), [str(c.cp_size) for c in plan.candidates])
        axes.set_xlim(-0.6, len(plan.candidates) - 0.4)
        axes.set_xlabel("context-parallel size (GPUs that share one sequence)")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    run, model = plan.config.run, plan.config.model
    figure.suptitle(
        f"{title}: {run.sequence_length:,} tokens, {model.num_layers} layers, on {plan.cluster.name}: "
        f"modelled, not measured",
        fontsize=14,
    )
    figure.savefig(path, dpi=110)


def _draw_memory(axes: Axes, plan: Plan) -> None:
    limit = plan.cluster.gpu_memory_bytes.value / GIB
    bars = [c.judged.memory_bytes for c in plan.candidates]
    totals = _stack(axes, _MEMORY, [{kind: num_bytes / GIB for kind, num_bytes in bar.items()} for bar in bars])
    top = 1.25 * limit if max(totals) < 1.1 * limit else min(1.15 * max(totals), 2.5 * limit)
    axes.set_ylim(0, top)
    axes.axhline(limit, color="black", ls="--", lw=1.5)
    axes.annotate(
        f"a GPU has {limit:.0f} GiB", (0.995, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", bbox={"fc": "white", "ec": "none", "pad": 1},
    )  # fmt: skip
    for x, (total, candidate) in enumerate(zip(totals, plan.candidates, strict=True)):
        fits = candidate.fits(plan.cluster)
        words = ("\u2191 " if total > top else "") + f"{total:.3g} GiB" + ("" if fits else "\ntoo large")
        axes.annotate(
            words, (x, min(total, top)), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom" if total < top * 0.93 else "top",
            weight="bold", color="black" if fits else "#b00020",
            bbox={"fc": "white", "ec": "none", "pad": 1, "alpha": 0.85},
        )  # fmt: skip
    axes.set_ylabel("GiB on the fullest GPU")
    axes.set_title(f"1. Does it fit?  ({plan.candidates[0].judged.strategy.name})", loc="left", weight="bold")
    _legend_below(axes)


def _draw_time(axes: Axes, plan: Plan) -> None:
    for name, colour, marker, outcomes in _curves(plan):
        seconds = [o.time.total_s for o in outcomes]
        axes.plot(range(len(seconds)), seconds, marker=marker, color=colour, label=name, alpha=0.9)
    best = plan.best
    for x, candidate in enumerate(plan.candidates):
        is_best = best is not None and candidate.cp_size == best.cp_size
        axes.annotate(
            f"{candidate.judged.time.total_s:.3g} s" + ("\nbest that fits" if is_best else ""),
            (x, max(o.time.total_s for o in candidate.outcomes)), xytext=(0, 8), textcoords="offset points",
            ha="center", weight="bold" if is_best else "normal",
        )  # fmt: skip
    seconds = [o.time.total_s for c in plan.candidates for o in c.outcomes]
    axes.set_yscale("log")
    axes.set_ylim(min(seconds) / 1.5, max(seconds) * 2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("seconds of one step (log)")
    axes.set_title("2. How long is a step, by how remote K/V arrive?", loc="left", weight="bold")
    if all(_spread(c.outcomes) < _ALIKE for c in plan.candidates):
        axes.text(0.03, 0.05, "the lines lie on each other: see 4", transform=axes.transAxes, color="#555555")
    _legend_below(axes)


def _draw_parts(axes: Axes, plan: Plan) -> None:
    shares = []
    for candidate in plan.candidates:
        time = candidate.judged.time
        parts = {**time.compute_s, "wire": sum(time.wire_s.values())}
        shares.append({part: 100 * seconds / time.total_s for part, seconds in parts.items()})
    _stack(axes, _TIME, shares)
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of a step")
    axes.set_title(
        f"3. Where does the time go?  ({plan.candidates[0].judged.strategy.name})", loc="left", weight="bold"
    )
    _legend_below(axes)


def _draw_moving(axes: Axes, plan: Plan) -> None:
    several = [x for x, c in enumerate(plan.candidates) if c.cp_size > 1]
    axes.set_title("4. What do the wire and merging add?", loc="left", weight="bold")
    axes.set_ylabel("% of a step")
    if not several:
        axes.text(0.5, 0.5, "nothing: one rank holds everything", ha="center", transform=axes.transAxes)
        return
    for name, colour, marker, outcomes in _curves(plan):
        axes.plot(several, [_moving_percent(outcomes[x]) for x in several], marker=marker, color=colour, label=name)
    axes.set_ylim(0, None)
    axes.text(
        0.03, 0.95, "u: share of the remote blocks that a rank's queries\nchoose together; untrained models are near 1",
        transform=axes.transAxes, va="top", color="#555555",
    )  # fmt: skip
    _legend_below(axes)


def _stack(axes: Axes, kinds: dict[str, tuple[str, str]], bars: list[dict[str, float]]) -> list[float]:
    """Draw `bars`, each {kind: height}; their heights in all."""
    floor = [0.0] * len(bars)
    for kind, (colour, label) in kinds.items():
        heights = [bar[kind] for bar in bars]
        axes.bar(range(len(bars)), heights, bottom=floor, color=colour, label=label, width=0.65)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    return floor


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=4, fontsize=8.5, frameon=False)


def _spread(outcomes: tuple[Outcome, ...]) -> float:
    seconds = [o.time.total_s for o in outcomes]
    return max(seconds) / min(seconds)


def _moving_percent(outcome: Outcome) -> float:
    moving_s = sum(outcome.time.wire_s.values()) + outcome.time.compute_s["merge"]
    return 100 * moving_s / outcome.time.total_s


def _curves(plan: Plan) -> list[tuple[str, str, str, list[Outcome]]]:
    """(name, colour, marker, one outcome a size) of every strategy."""
    curves = []
    for index, strategy in enumerate(plan.options.strategies()):
        colour, marker = _LINES.get(strategy.how, (_FETCHES[index % len(_FETCHES)], "o"))
        curves.append((strategy.name, colour, marker, [c.outcomes[index] for c in plan.candidates]))
    return curves
