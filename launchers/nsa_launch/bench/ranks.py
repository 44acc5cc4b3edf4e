"""Real ranks: first compared with one rank, then timed in every way, beside what the planner says."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nsa_dist.bench.case import Case
from nsa_dist.bench.few.everyday import Everyday
from nsa_dist.bench.show import everyday as show_everyday
from nsa_dist.bench.show import lines, pictures, timeline
from nsa_dist.bench.show.report import Report, Row, machine
from nsa_dist.bench.tasks import Alone, Compare, Links, Measure
from nsa_dist.bench.world import Place
from nsa_launch.bench import training
from nsa_launch.bench.request import Request
from nsa_launch.bench.team import TaskFailed, Team

if TYPE_CHECKING:
    from nsa_dist.bench.predicted import Predictor

# Seconds that a step must have left to be begun, and may take at most: a hang must not take the rest with it.
_LEAST_S, _MOST_S = 15.0, 120.0
_LINK_BYTES = (2**16, 2**24, 2**28)
# Of the norm, one rounding to bf16 of operands and results: what the kernels' benchmark allows, too.
_BF16_ERROR, _FP64_ERROR = 1e-2, 1e-10


class Bench:
    """The steps in order of importance; each is left out, and named, when the time is over."""

    def __init__(self, request: Request, place: Place, team: Team, report: Report) -> None:
        self.request, self.place, self.team, self.report = request, place, team, report
        self.sizes = [size for size in (2, 4, 8, 16) if size < place.num_ranks] + [place.num_ranks]
        self.predictor = _predictor(request, place, report)

    @property
    def steps(self) -> tuple[Callable[[], None], ...]:
        return self.checks, self.links, self.scaling, self.cases

    def checks(self) -> None:
        self.report.say("\nAgainst one rank: is it the same?")
        for case in self._asked(self._checked()):
            rows = self._run(f"comparison of {case.name}", Compare(case))
            if isinstance(rows, str):
                self.report.add("checks", {**case.as_data(), "error": rows, "wrong": rows}, lines.failed(case, rows))
                continue
            if rows is not None:
                row = _judged(case, rows, on_gpu=self.place.device == "cuda")
                self.report.add("checks", row, lines.check(row))

    def links(self) -> None:
        self.report.say("\nLinks: GB/s that a rank sends (and receives) while all do the same; us of the smallest")
        for size in self.sizes:
            found = self._run(f"links of {size} ranks", Links(size, _link_bytes(self.place)))
            if isinstance(found, str):
                self.report.add("links", {"cp_size": size, "error": found}, f"  {size} ranks: {found}")
            elif found is not None:
                for per_rank in zip(*found, strict=True):
                    slowest = max(per_rank, key=lambda row: row["seconds"])
                    row = {"cp_size": size, **slowest, "bytes_per_s": slowest["sent_bytes"] / slowest["seconds"]}
                    self.report.add("links", row, lines.link(row))
        if self.predictor and self.place.backend == "nccl":  # what shares a GPU says nothing of links
            self.predictor.take_links(self.report.data.get("links", []), self.report.source)

    def scaling(self) -> None:
        """The same tokens a rank over more ranks, each beside the same share with nothing sent."""
        self.report.say("\nScaling at fixed tokens a rank: ms forward / backward; the same share alone; efficiency")
        one: Row | None = None
        for case in self._asked(self.request.sizes.scaling([1, *self.sizes])):
            row = self._timed(case)
            if row is None or "error" in row:
                if row:
                    self.report.add("scaling", row, lines.failed(case, row["error"]))
                continue
            alone = self._run(f"{case.name} alone", Alone(case, self.request.repeats))
            one = one or row
            row |= _efficiency(row, one, alone if isinstance(alone, list) else None)
            self.report.add("scaling", row, lines.scaling(row))

    def cases(self) -> None:
        self.report.say("\nEvery way over all ranks: ms forward / backward, slowest rank; predicted; wire; memory")
        for case in self._asked(self.request.sizes.timed(self.place.num_ranks)):
            row = self._timed(case)
            if row is not None:
                self.report.add("cases", row, lines.case(row))

    def everyday(self) -> None:
        """Few tokens a rank by every transport; the slowest rank of each run."""
        self.report.say("\nFew tokens a rank: ms forward + backward, slowest rank; host; above an instant transport")
        transports = ("all_to_all",) if self.place.backend != "nccl" else ("one_sided", "all_to_all")
        for cases in self.request.sizes.everyday(self.place.num_ranks, transports):
            per_rank = cases[0].tokens // cases[0].cp_size
            name = f"{per_rank} tokens a rank, {cases[0].heads.num_q_heads}/{cases[0].heads.num_kv_heads} heads"
            found = self._run(name, Everyday(cases, 20 if per_rank <= 2**14 else 5, divides=per_rank == 2**13))
            if isinstance(found, str):
                self.report.add("everyday", {"name": name, "error": found}, f"  {name} FAILED: {found}")
            elif found is not None:
                for row in show_everyday.slowest(found):
                    row = {"name": name, "per_rank": per_rank, "heads": cases[0].heads.num_q_heads, **row}
                    self.report.add("everyday", row, show_everyday.line(row))

    def timeline(self) -> None:
        """Of the first rank, fetching, the first length."""
        case = self.request.sizes.case(self.request.sizes.tokens[0], self.place.num_ranks)
        rows = self._run(f"timeline of {case.name}", Measure(case, self.request.repeats, keep_spans=True))
        if isinstance(rows, list):
            path = self.request.out / "timeline.png"
            timeline.draw(rows[0]["spans"], f"One layer, rank 0: {case.name}\n{self.report.source}", path)
            self.report.say(f"\nwrote {path}")
        elif rows is not None:
            self.report.leave_out(f"timeline of {case.name}", rows)

    def _asked(self, cases: Iterator[Case]) -> Iterator[Case]:
        """Those that `--only` lets through."""
        return (case for case in cases if self.request.only in case.name)

    def _checked(self) -> Iterator[Case]:
        """Every size in zigzag, the largest also in contiguous order and by both baselines."""
        heads = self.request.sizes.heads[0]
        if self.place.device == "cpu":  # where bits depend on how work is cut: in fp64, to rounding
            heads = replace(heads, element_bytes=8)
        for size in self.sizes:
            yield self.request.sizes.case(self.request.sizes.checked_tokens, size, heads=heads)
        yield self.request.sizes.case(self.request.sizes.checked_tokens, size, heads=heads, layout="contiguous")
        for mode in ("all-gather", "shared all-gather"):
            yield self.request.sizes.case(self.request.sizes.checked_tokens, size, heads=heads, mode=mode)

    def _timed(self, case: Case) -> Row | None:
        """A row, with an error if the case failed; None if there was no time for it."""
        rows = self._run(case.name, Measure(case, self.request.repeats))
        predicted = {"predicted": self.predictor.of(case)} if self.predictor else {}
        if rows is None:
            return None
        found = {"error": rows} if isinstance(rows, str) else {**_slowest(rows), "ranks": rows}
        return {**case.as_data(), **predicted, "flops": case.flops(), **found}

    def _run(self, name: str, task: Callable[[Any], Any]) -> list[Any] | str | None:
        """What the ranks of the group found, or why they did not, or None if there was no time to ask."""
        left_s = self.request.left_s - (training.LEAST_S if self.request.training else 0.0)
        if left_s < _LEAST_S:
            self.report.leave_out(name, "the time is over")
            return None
        try:
            return [row for row in self.team.run(task, min(left_s, _MOST_S)) if row is not None]
        except TaskFailed as error:
            return str(error)


def run(request: Request, place: Place) -> bool:
    """Whether any comparison with one rank found a difference."""
    where = "sharing one device" if place.shared else "a GPU each"
    ranks = f"{place.num_ranks} ranks over {place.backend}, {where}"
    report = Report(request.out, machine(request.device, 1 if place.shared else place.num_ranks, ranks))
    with Team(place) as team:
        bench = Bench(request, place, team, report)
        for step in (bench.checks, bench.links) if request.everyday else bench.steps:
            step()
        if request.trace:
            bench.timeline()
        if request.everyday:
            bench.everyday()
    if request.training and not request.everyday:
        training.run(request, place, report)
    if any("error" not in row for row in report.data.get("everyday", [])):
        show_everyday.draw(report.data, request.out / "everyday.png")
    if any("error" not in row for row in report.data.get("cases", [])):
        pictures.draw_ways(report.data, request.out / "cp.png")
    return report.failed()


def _predictor(request: Request, place: Place, report: Report) -> "Predictor | None":
    """The planner's word, where what it needs is installed. ValueError for a cluster description that is none."""
    if find_spec("pydantic") is None:
        report.leave_out("predictions", "the planner needs pydantic; pip install --editable '.[train]' installs it")
        return None
    from nsa_dist.bench.predicted import Predictor
    from nsa_dist.planner.cluster import DEFAULT_CLUSTER

    return Predictor(request.cluster or DEFAULT_CLUSTER, place.num_ranks)


def _judged(case: Case, rows: list[Row], on_gpu: bool) -> Row:
    """The ranks' comparisons as one row; `wrong` says what is not as it must be."""
    errors = {name: max(row["errors"][name] for row in rows) for name in rows[0]["errors"]}
    same = [name for name in errors if all(name in row["same"] for row in rows)]
    wrong = [f"{name} differs by {error:.1e}" for name, error in errors.items() if not error <= _allowed(on_gpu)]
    must_be_same = ("out", "block_indices", "dq") if on_gpu and case.mode == "fetch" else ("block_indices",)
    wrong += [f"{name} is not the same, bit for bit" for name in must_be_same if name not in same]
    if not all(row["repeats"] for row in rows):
        wrong.append("a second run gave other bits")
    return {**case.as_data(), "same": same, "errors": errors, "wrong": ", ".join(wrong)}


def _allowed(on_gpu: bool) -> float:
    return _BF16_ERROR if on_gpu else _FP64_ERROR


def _slowest(rows: list[Row]) -> Row:
    """Times and parts of the slowest rank; the most that any rank sent, waited and held."""
    slowest = max(rows, key=lambda row: row["forward_s"] + row["backward_s"])
    waits = [[row["parts_s"].get(f"{phase}.wait", 0.0) for row in rows] for phase in ("forward", "backward")]
    kinds = rows[0]["sent_bytes"]
    return {
        "forward_s": max(row["forward_s"] for row in rows),
        "backward_s": max(row["backward_s"] for row in rows),
        "parts_s": slowest["parts_s"],
        "exposed_s": {"forward": max(waits[0]), "backward": max(waits[1])},
        "sent_bytes": {kind: max(row["sent_bytes"].get(kind, 0) for row in rows) for kind in kinds},
        "pages": max(row["pages"] for row in rows),
        "union_fraction": max(max(row["union_fractions"], default=0.0) for row in rows),
        "peak_bytes": max((row["peak_bytes"] for row in rows if row["peak_bytes"]), default=None),
    }


def _efficiency(row: Row, one: Row, alone: list[Row] | None) -> Row:
    """Two readings of one word: against the same share with nothing sent, and FLOPs a second and rank against one."""
    seconds = row["forward_s"] + row["backward_s"]
    flops = [r["flops"] / (r["forward_s"] + r["backward_s"]) for r in (row, one)]
    found: Row = {"flops_efficiency": flops[0] / flops[1]}
    if alone:
        share_s = max(r["forward_s"] + r["backward_s"] - _made_up(r) for r in alone)
        found |= {"share_alone_s": share_s, "share_efficiency": share_s / seconds}
    return found


def _made_up(row: Row) -> float:
    return sum(s for name, s in row["parts_s"].items() if name.endswith("made up"))


def _link_bytes(place: Place) -> tuple[int, ...]:
    return _LINK_BYTES if place.backend == "nccl" else (2**10, 2**16)
