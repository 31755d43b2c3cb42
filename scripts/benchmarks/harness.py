"""What every benchmark shares: interleaved timing, ratios of paired bursts, and a table that says asked → reached.

Machines are noisy, so nothing is timed alone: the cases run in turn (A B C A B C …), each case's ratio to another is taken round by
round, and the median of those ratios is the figure. A benchmark writes `docs/bench/<topic>.json` and the same as a Markdown table.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs" / "bench"
Times = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number asked for: what, the goal in words, what was reached, whether it holds (None: no goal), a note."""

    what: str
    asked: str
    reached: str
    holds: bool | None = None
    note: str = ""


def interleave(
    cases: dict[str, Callable[[], object]],
    *,
    repeats: int,
    inner: int = 1,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Run the cases in turn and return the seconds of each burst of `inner` calls, divided by `inner`."""
    times: Times = {name: [] for name in cases}
    for round_number in range(warmup + repeats):
        for name, case in cases.items():
            start = clock()
            for _ in range(inner):
                case()
            if round_number >= warmup:
                times[name].append((clock() - start) / inner)
    return times


def ratio(times: Times, name: str, to: str) -> tuple[float, float, float]:
    """Return (median, first quartile, third quartile) of the round-by-round ratios `name` / `to`."""
    paired = sorted(a / b for a, b in zip(times[name], times[to], strict=True))
    if len(paired) < 2:
        return paired[0], paired[0], paired[0]
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return middle, low, high


def machine() -> dict[str, Any]:
    """Say where the numbers come from: processor, cores, Python, and the versions that matter."""
    import onnxruntime
    import torch

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "onnxruntime": onnxruntime.__version__,
    }


def write(topic: str, rows: list[Row], *, details: object = None) -> None:
    """Print the table, and write it with the details to `docs/bench/<topic>.json` and `.md`."""
    DOCS.mkdir(parents=True, exist_ok=True)
    document = {"command": f"scripts/bench {topic}", "machine": machine(), "rows": [asdict(r) for r in rows], "details": details}
    (DOCS / f"{topic}.json").write_text(json.dumps(document, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    table = markdown(topic, rows)
    (DOCS / f"{topic}.md").write_text(table, encoding="utf-8")
    print(table)


def markdown(topic: str, rows: list[Row]) -> str:
    """Return the rows as a Markdown table with a line that says where they were measured."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [f"`scripts/bench {topic}` ({where})", "", "| what | asked | reached | holds | note |", "|---|---|---|---|---|"]
    marks = {True: "yes", False: "**no**", None: "–"}
    lines += [f"| {r.what} | {r.asked} | {r.reached} | {marks[r.holds]} | {r.note} |" for r in rows]
    return "\n".join(lines) + "\n"


def note(text: str) -> None:
    """Say on stderr what is being measured now."""
    print(text, file=sys.stderr, flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
