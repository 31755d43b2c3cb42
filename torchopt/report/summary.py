"""The numbers of a run as one text table: before, after, and the ratio. It is printed in the terminal and stands in the README.

The report of a run is a plain dict, written to `report.json`:

    recipe        str      the recipe's file name
    seconds       float    wall time of the run
    score         {name: "accuracy", baseline: float, final: float, stages: [{name, epoch, score}, …]}     fractions in [0, 1]
    size_bytes    {baseline: int, final: int, final_gzip: int, baseline_gzip: int}
    latency_ms    {baseline: float, final: float, ratio: float, threads: int, low/high quartiles}
    macs          {baseline: int, final: int}     multiply-adds of one sample, which `shrink` makes fewer
    layers        [{name, shape, sparsity, distinct_values, bits, bytes, entropy_bits, techniques, histogram}, …]
    placement     {integer: [names], float: [names], layers: [{name, kernel, integer, reason, weight_bytes}, …], kernels: {type: count}}
    verify        {weights_equal: bool, max_steps: float | null, top1_agreement: float, samples: int, …}
    skipped       [{name, technique, reason}, …]

`histogram` is {edges: [n + 1 floats], counts: [n ints], values: [the distinct values, where there are few]} or null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from torchopt.io.importing import unnoticed

with unnoticed():
    from rich.console import Console
    from rich.table import Table

RunReport = dict[str, Any]
FEW = 64  # distinct values that a picture can still show one by one


def summary_table(report: RunReport, *, width: int = 100) -> str:
    """Return the run's numbers as a text table of at most `width` columns."""
    table = Table(title=f"torchopt: {report.get('recipe', 'run')}")
    table.add_column("")
    for name in ("float", "compressed", ""):
        table.add_column(name, justify="right")
    for cells in summary_rows(report):
        table.add_row(*cells)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def summary_rows(report: RunReport) -> list[tuple[str, str, str, str]]:
    """Return (what, float, compressed, comparison) for each headline number."""
    score, size, latency = report["score"], report["size_bytes"], report["latency_ms"]
    placement, verdict = report["placement"], report["verify"]
    layers = len(placement["integer"]) + len(placement["float"])
    steps = verdict.get("max_steps")
    count = sum(int(np.prod(layer["shape"])) for layer in report["layers"])
    zeros = sum(layer["sparsity"] * int(np.prod(layer["shape"])) for layer in report["layers"])
    rows = [
        (score.get("name", "accuracy"), f"{score['baseline']:.2%}", f"{score['final']:.2%}", _points(score)),
        ("file on disk, bytes", f"{size['baseline']:,}", f"{size['final']:,}", f"÷ {size['baseline'] / size['final']:.1f}"),
        (
            "latency, ms",
            f"{latency['baseline']:.3f}",
            f"{latency['final']:.3f}",
            f"× {latency['final'] / latency['baseline']:.2f}",
        ),
        ("zero weights", "", f"{zeros / count:.1%}" if count else "–", f"of {count:,}"),
        ("integer layers in ORT", "", f"{len(placement['integer'])} of {layers}", "all" if not placement["float"] else "not all"),
        ("weights equal torch's", "", "bit for bit" if verdict["weights_equal"] else "NO", ""),
        ("top-1 agreement with torch", "", f"{verdict['top1_agreement']:.2%}", "" if steps is None else f"≤ {steps:.1f} steps"),
    ]
    macs = report.get("macs", {"baseline": 0, "final": 0})
    if macs["final"] < macs["baseline"]:
        share = 1 - macs["final"] / macs["baseline"]
        rows.insert(3, ("multiply-adds", f"{macs['baseline']:,}", f"{macs['final']:,}", f"−{share:.0%}"))
    return rows


def histogram(value: np.ndarray, *, bins: int = 60) -> dict[str, Any]:
    """Return the histogram of a weight for the report: edges, counts, and its distinct values where there are few."""
    flat = value.reshape(-1)
    nonzero = flat[flat != 0]
    counts, edges = np.histogram(nonzero if nonzero.size else flat, bins=bins)
    distinct = np.unique(flat)
    values = [float(v) for v in distinct] if len(distinct) <= FEW else None
    return {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts], "values": values}


def _points(score: dict[str, Any]) -> str:
    return f"{100 * (score['final'] - score['baseline']):+.2f} points"
