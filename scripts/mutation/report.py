"""The share of faults that tests notice, by room, with its interval; and the faults that nobody notices, by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KILLED = ("failed", "late")


def wilson(hits: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Example:
        >>> [round(end, 3) for end in wilson(90, 100)]
        [0.826, 0.945]
    """
    if not tried:
        return 0.0, 1.0
    share = hits / tried
    middle = (share + z * z / (2 * tried)) / (1 + z * z / tried)
    width = z / (1 + z * z / tried) * (share * (1 - share) / tried + z * z / (4 * tried * tried)) ** 0.5
    return max(middle - width, 0.0), min(middle + width, 1.0)


def write(folder: Path, found: list[dict[str, Any]], rooms: list[str], about: dict[str, Any]) -> str:
    """Write mutants.json and mutants.md; return the table."""
    rows = []
    for room in [*rooms, ""]:
        mine = [f for f in found if f["file"].startswith(room)]
        counted = [f for f in mine if f["result"] != "equivalent"]
        killed, low, high = sum(f["result"] in KILLED for f in counted), 0.0, 1.0
        low, high = wilson(killed, len(counted))
        row = {"room": room or "all", "planted": len(mine), "equivalent": len(mine) - len(counted), "killed": killed}
        row |= {
            "survived": sum(f["result"] == "passed" for f in counted),
            "untested": sum(f["result"] == "untested" for f in counted),
        }
        rows.append(row | {"share": killed / max(len(counted), 1), "low": low, "high": high})
    text = json.dumps({"about": about, "rooms": rows, "mutants": found}, indent=1, ensure_ascii=False)
    (folder / "mutants.json").write_text(text + "\n", encoding="utf-8")
    table = _table(rows)
    (folder / "mutants.md").write_text(_page(table, found, about), encoding="utf-8")
    return table


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| room | planted | equivalent | killed | survived | no test runs the line | share killed (95 %) |",
        "|" + "---|" * 7,
    ]
    for r in rows:
        share = f"{r['share']:.0%} ({r['low']:.0%} … {r['high']:.0%})"
        lines.append(
            f"| {r['room']} | {r['planted']} | {r['equivalent']} | {r['killed']} | {r['survived']} | {r['untested']} | {share} |"
        )
    return "\n".join(lines)


def _page(table: str, found: list[dict[str, Any]], about: dict[str, Any]) -> str:
    drawn = f"{about['planted']} of {about['sites']} places, seed {about['seed']}, commit {about['commit']}, {about['minutes']:.0f} minutes"
    lines = [f"`scripts/mutants`: {drawn}. Tests: {about['tests']} ({about['test_count']}).", "", table, ""]
    for result, title in (("passed", "Survived"), ("untested", "No test runs the line"), ("equivalent", "Equivalent")):
        mine = [f for f in found if f["result"] == result]
        if mine:
            lines += [f"## {title}", ""]
            for f in mine:
                reason = f" — {f['reason']}" if f.get("reason") else ""
                lines.append(f"- `{f['file']}:{f['line']}` {f['kind']}: `{_one(f['before'])}` → `{_one(f['after'])}`{reason}")
            lines.append("")
    return "\n".join(lines)


def _one(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= 150 else short[:147] + "…"
