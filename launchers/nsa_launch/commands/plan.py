"""`nsa-dist plan`: will it fit, which size, what will it take; with --full all it knows. Nothing is started."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nsa_dist.planner.cluster import DEFAULT_CLUSTER, load_cluster
from nsa_dist.planner.core.strategies import GIB, Options
from nsa_dist.planner.fetching import HEADINGS, cells, fetching
from nsa_dist.planner.inference import CachePlan, cache_plans, sentence
from nsa_dist.planner.measured import with_bench
from nsa_dist.planner.memory import KINDS
from nsa_dist.planner.report import as_data
from nsa_dist.planner.sweep import Candidate, Plan, make_plan
from nsa_dist.planner.verdict import CAVEATS, summary, verdict
from nsa_dist.train.files.atomic import write_atomically
from nsa_launch.config import load

_FILE_COLUMNS = 160


@dataclass(frozen=True)
class Request:
    """The words of the command line. How pages are fetched is the configuration's to say, in `parallel`."""

    config: Path
    overrides: Sequence[str]
    cluster: Path | None
    bench: Sequence[Path]
    num_nodes: int | None
    options: Options
    cp_sizes: tuple[int, ...] | None
    context: int | None
    sequences: int
    full: bool
    json: Path | None
    picture: Path | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Request":
        """From the words of `plan_arguments`. ValueError for numbers that make no sense."""
        if arguments.sequences is not None and arguments.context is None:
            raise ValueError(
                f"--sequences {arguments.sequences} was given without --context, and how long they are decides what a "
                f"cache takes; give --context TOKENS, too"
            )
        return cls(
            config=arguments.config,
            overrides=arguments.overrides,
            cluster=arguments.cluster,
            bench=arguments.bench,
            num_nodes=arguments.nodes,
            options=Options(union_fractions=arguments.u, overlap=arguments.overlap),
            cp_sizes=arguments.cp,
            context=arguments.context,
            sequences=1 if arguments.sequences is None else arguments.sequences,
            full=arguments.full,
            json=arguments.json,
            picture=arguments.picture,
        )


def run(request: Request) -> None:
    """Print the plan, and write its files. ValueError for a configuration or cluster that makes no sense."""
    config = load(request.config, request.overrides)
    cluster = load_cluster(request.cluster or DEFAULT_CLUSTER, num_nodes=request.num_nodes)
    for path in request.bench:
        cluster = with_bench(cluster, path, config.model.num_attention_heads // config.model.num_query_groups)
    options = replace(request.options, fetch=config.parallel.fetch_options())
    plan = make_plan(config, cluster, options, request.cp_sizes)
    caches = []
    if request.context is not None:
        sizes = [candidate.cp_size for candidate in plan.candidates]
        caches = cache_plans(config, cluster, request.context, request.sequences, sizes)
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe wraps nothing
        console.width = _FILE_COLUMNS
    show_summary(plan, console)
    if caches:
        console.print(f"\n{sentence(caches)}", markup=False, soft_wrap=True)
        console.print(_cache_table(caches))
    if request.full:
        show_tables(plan, console)
    else:
        print("\nTables, constants, and what this is worth: --full")
    if request.json:
        write_atomically(request.json, json.dumps(as_data(plan, caches), indent=2) + "\n")
    if request.picture:
        from nsa_dist.planner.picture import draw

        request.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(plan, request.config.stem, request.picture)
    written = [str(path) for path in (request.json, request.picture) if path]
    if written:
        print(f"wrote {' '.join(written)}")


def show_summary(plan: Plan, console: Console) -> None:
    """The verdict in three lines."""
    for line in summary(plan):
        console.print(line, markup=False, soft_wrap=True)


def show_tables(plan: Plan, console: Console) -> None:
    """Tables first, what they mean last, where a terminal leaves the eye."""
    console.print()
    for table in (_memory_table, _time_table, _wire_table, _strategy_table, _fetching_table):
        console.print(table(plan))
    constants = plan.cluster.constants().items()
    sources = [f"{name} = {c.value:.4g}, {c.evidence}: {c.source}" for name, c in constants]
    _print_list(console, f"Constants of {plan.cluster.name}", sources)
    _print_list(console, "What this is worth", CAVEATS)
    _print_list(console, "Verdict, sentence by sentence", verdict(plan))


def _print_list(console: Console, title: str, lines: Sequence[str]) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    for line in lines:
        console.print(f"- {line}", markup=False, soft_wrap=True)


def _sizes_table(plan: Plan, title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column(first, no_wrap=True)
    for candidate in plan.candidates:
        best = plan.best is not None and candidate.cp_size == plan.best.cp_size
        table.add_column(f"cp {candidate.cp_size}" + (" *" if best else ""), justify="right", no_wrap=True)
    return table


def _memory_table(plan: Plan) -> Table:
    judged = plan.options.strategies()[0].name
    table = _sizes_table(plan, f"Memory of the fullest GPU, GiB ({judged})", "kind")
    for kind in KINDS:
        table.add_row(kind, *(_gib(c.judged.memory_bytes[kind]) for c in plan.candidates))
    table.add_section()
    table.add_row("total", *(_gib(c.judged.total_bytes) for c in plan.candidates), style="bold")
    fits = ("yes" if c.fits(plan.cluster) else "NO" for c in plan.candidates)
    table.add_row(f"fits in {plan.cluster.gpu_memory_bytes.value / GIB:.0f}", *fits)
    return table


def _time_table(plan: Plan) -> Table:
    table = _sizes_table(plan, f"Seconds of one step ({plan.options.strategies()[0].name})", "part")
    times = [c.judged.time for c in plan.candidates]
    for part in times[0].compute_s:
        table.add_row(part, *(_s(time.compute_s[part]) for time in times))
    table.add_row("wire", *(_s(sum(time.wire_s.values())) for time in times))
    table.add_section()
    table.add_row("step", *(_s(time.total_s) for time in times), style="bold")
    table.add_row("replicas", *(str(c.replicas) for c in plan.candidates))
    table.add_row("layout", *(c.layout for c in plan.candidates))
    table.add_row("load imbalance", *(f"{c.imbalance[c.layout]:.3f}" for c in plan.candidates))
    return table


def _wire_table(plan: Plan) -> Table:
    title = f"On the wire in one step ({plan.options.strategies()[0].name}): MB sent by the busiest rank / ms"
    table = _sizes_table(plan, title, "kind")
    for kind in dict.fromkeys(kind for c in plan.candidates for kind in c.judged.sent_bytes):
        table.add_row(kind, *(_sent(c, kind) for c in plan.candidates))
    for kind in ("tensor", "gradients"):
        table.add_row(kind, *(f"{1e3 * c.judged.time.wire_s[kind]:,.1f}" for c in plan.candidates))
    return table


def _sent(candidate: Candidate, kind: str) -> str:
    time_s = candidate.judged.time.wire_s.get(kind, 0.0)
    return f"{candidate.judged.sent_bytes.get(kind, 0) / 1e6:,.0f} / {1e3 * time_s:,.1f}"


def _strategy_table(plan: Plan) -> Table:
    table = _sizes_table(plan, "How remote K/V arrive: seconds of one step / GiB held for it", "way")
    for index, strategy in enumerate(plan.options.strategies()):
        outcomes = [c.outcomes[index] for c in plan.candidates]
        table.add_row(strategy.name, *(f"{_s(o.time.total_s)} / {_gib(o.held_bytes)}" for o in outcomes))
    return table


def _fetching_table(plan: Plan) -> Table:
    table = Table(title="When fetching pays, in time, and what each holds of remote K/V", title_justify="left")
    us = plan.options.union_fractions
    held = [*(f"GiB, u={u:g}" for u in us), "GiB, three pairs", "GiB, one pair by heads"]
    for heading in (*HEADINGS, *(f"saved, u={u:g}" for u in us), *held):
        table.add_column(heading, justify="right")
    for row in fetching(plan):
        table.add_row(*cells(row))
    return table


def _cache_table(caches: Sequence[CachePlan]) -> Table:
    """Of a GPU that holds the whole model and its share of the cache."""
    memory = caches[0].cluster.gpu_memory_bytes.value / GIB
    table = Table(title="In inference, on each GPU, GiB", title_justify="left", min_width=60)
    table.add_column("", no_wrap=True)
    for plan in caches:
        table.add_column(f"cp {plan.cp_size}", justify="right", no_wrap=True)
    rows: list[tuple[str, Callable[[CachePlan], str]]] = [
        ("weights", lambda plan: _gib(plan.weight_bytes)),
        ("cache", lambda plan: _gib(plan.cache_bytes)),
        ("of it rings", lambda plan: _gib(plan.ring_bytes)),
        ("compressed rows", lambda plan: plan.cmp_placement if plan.cp_size > 1 else "-"),
        ("cache if replicated", lambda plan: _gib(plan.bytes_if("replicated"))),
        ("cache if sharded", lambda plan: _gib(plan.bytes_if("sharded"))),
        ("a dense cache", lambda plan: _gib(plan.dense_bytes)),
        (f"fits in {memory:.0f}", _fits),
        ("longest, tokens", lambda plan: f"{plan.longest:,}"),
        ("longest if dense", lambda plan: f"{plan.longest_dense:,}"),
    ]
    for name, cell in rows:
        table.add_row(name, *map(cell, caches))
    return table


def _fits(plan: CachePlan) -> str:
    if plan.fits:
        return "yes"
    return "if sharded" if plan.bytes_if("sharded") <= plan.room_bytes else "NO"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"


def _s(seconds: float) -> str:
    return f"{seconds:,.4f}" if seconds < 10 else f"{seconds:,.2f}"
