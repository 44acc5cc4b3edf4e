"""Rows of a bench as lines of its table."""

from nsa_dist.bench.case import Case
from nsa_dist.bench.show.report import Row, gib, mb, ms

PARTS = ("phi", "cmp", "select", "slc", "win")
_WIDTH = 36


def failed(case: Case, error: str) -> str:
    return f"  {case.name:{_WIDTH}} FAILED: {error}"


def check(row: Row) -> str:
    verdict = f"WRONG: {row['wrong']}" if row["wrong"] else "right"
    same = " ".join(name for name in ("out", "block_indices", "dq") if name in row["same"]) or "nothing"
    worst = max(row["errors"], key=lambda name: row["errors"][name])
    return (
        f"  {row['case']} {row['layout']:{max(1, _WIDTH - len(row['case']))}} {verdict}; same bits: {same}; "
        f"most off: {worst} {row['errors'][worst]:.1e}"
    )


def link(row: Row) -> str:
    return (
        f"  {row['cp_size']} ranks {row['collective']:15} {mb(row['sent_bytes']):>8} MB "
        f"{row['bytes_per_s'] / 1e9:8.2f} GB/s {1e6 * row['seconds']:10,.0f} us"
    )


def case(row: Row) -> str:
    if "error" in row:
        return f"  {row['case']:{_WIDTH}} FAILED: {row['error']}"
    exposed, told = row["exposed_s"], row.get("predicted")
    times = sent = peak = ""
    if told:
        times = f" (predicted {ms(told['forward_s'])} / {ms(told['backward_s'])})"
        sent = f" (predicted {mb(sum(told['sent_bytes'].values()))})"
        peak = f" (predicted {gib(told['peak_bytes'])})"
    return (
        f"  {row['case']:{_WIDTH}}{ms(row['forward_s']):>9} /{ms(row['backward_s']):>9}{times}"
        f"  waited {ms(exposed['forward'])} / {ms(exposed['backward'])}"
        f"  sent {mb(sum(row['sent_bytes'].values()))} MB{sent}  peak {gib(row['peak_bytes'])} GiB{peak}"
        f"  u {row['union_fraction']:.2f}"
    )


def scaling(row: Row) -> str:
    alone = ""
    if "share_alone_s" in row:
        alone = f"  alone {ms(row['share_alone_s']):>9}  efficiency {100 * row['share_efficiency']:.0f}%"
    return (
        f"  {row['case']:{_WIDTH}}{ms(row['forward_s']):>9} /{ms(row['backward_s']):>9}{alone}"
        f"  FLOP/s a rank against one rank {100 * row['flops_efficiency']:.0f}%"
    )


def share(row: Row) -> str:
    """One rank of many."""
    if "error" in row:
        return f"  {row['case']:{_WIDTH}} FAILED: {row['error']}"
    parts = row["parts_s"]
    by_branch = "  ".join(
        f"{part} {ms(parts.get(f'forward.{part}', 0))}/{ms(parts.get(f'backward.{part}', 0))}"
        for part in (*PARTS, "made up")
    )
    return (
        f"  {row['case']:{_WIDTH}}{ms(row['forward_s']):>9} /{ms(row['backward_s']):>9}  peak {gib(row['peak_bytes'])}"
        f"  u {max(row['union_fractions']):.3f}  pages {row['pages']}  sent {mb(sum(row['sent_bytes'].values()))} MB\n"
        f"      {by_branch}"
    )
