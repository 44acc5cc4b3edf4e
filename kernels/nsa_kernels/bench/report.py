"""The table, printed and written case by case, its figures as JSON, and the short one of the READMEs as Markdown."""

import json
from dataclasses import asdict
from pathlib import Path

from nsa_kernels.bench.cases import Case, pack_name
from nsa_kernels.bench.table import markdown

COLUMNS = {
    "forward_ms": "fwd ms",
    "backward_ms": "bwd ms",
    "forward_TFLOP_per_s": "fwd TF/s",
    "backward_TFLOP_per_s": "bwd TF/s",
    "peak_gib": "peak GiB",
}


class Report:
    """Holds what was measured. `failed` once any row says WRONG or FAILED."""

    def __init__(self, folder: Path, machine: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._text, self._json, self._short = (folder / f"bench.{suffix}" for suffix in ("txt", "json", "md"))
        self._comparison = folder / "compare.txt"
        self.machine = machine
        self.cases: list[dict] = []  # as in bench.json
        self.failed = False
        self._text.write_text("")
        described = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in machine.items())
        self._print(f"{described}\npeak: memory over inputs, output and their gradients; TF/s: of what is not masked")

    def add(self, case: Case, rows: list[dict]) -> None:
        """Print a case and write all figures so far."""
        self.failed |= any(str(row.get("note", "")).startswith(("WRONG", "FAILED")) for row in rows)
        self._print("\n".join(["", *_table(case, [*rows, *_sum(rows)])]))
        self.cases.append({"case": case.name, **asdict(case), "rows": rows})
        self._json.write_text(json.dumps({"machine": self.machine, "cases": self.cases}, indent=1) + "\n")
        columns = ((_title(c), {row["step"]: row for row in c["rows"]}) for c in self.cases)
        self._short.write_text(markdown(columns))

    def add_comparison(self, text: str) -> None:
        """Print it and keep it."""
        print(f"\n{text}", end="", flush=True)
        self._comparison.write_text(text)

    def _print(self, text: str) -> None:
        print(text, flush=True)
        with self._text.open("a") as file:
            file.write(text + "\n")


def _title(figures: dict) -> str:
    """Of a column: `64k, Hq 64 / Hkv 4`, and what is not as usual."""
    unusual = "" if figures["dim_k"] == figures["dim_v"] == 128 else f", D {figures['dim_k']}/{figures['dim_v']}"
    unusual += ", correlated" if figures["correlated"] else ""
    unusual += f", {pack_name(figures['documents'])}" if figures["documents"] else ""
    return f"{figures['tokens'] // 1024}k, Hq {figures['num_q_heads']} / Hkv {figures['num_kv_heads']}{unusual}"


def _sum(rows: list[dict]) -> list[dict]:
    """How many times faster the whole layer is than dense attention."""
    by_step = {row["step"]: row for row in rows}
    nsa, dense = by_step.get("all", {}), by_step.get("dense", {})
    if "forward_ms" not in nsa or "forward_ms" not in dense:
        return []
    ratios = {key: dense[key] / nsa[key] for key in ("forward_ms", "backward_ms")}
    return [{"step": "dense / all", **ratios}]


def _table(case: Case, rows: list[dict]) -> list[str]:
    lines = [f"{case.name:34}" + "".join(f"{title:>10}" for title in COLUMNS.values())]
    for row in rows:
        cells = (f"{row[key]:10.2f}" if key in row else " " * 10 for key in COLUMNS)
        lines.append(f"  {row['step']:32}" + "".join(cells) + (f"  {row['note']}" if "note" in row else ""))
    return lines
