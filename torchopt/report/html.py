"""The page of a run: one self-contained HTML file that needs no network, to be looked at rather than read."""

from __future__ import annotations

import os
from typing import Any

import jinja2

from torchopt.io.files import write_text
from torchopt.report.plots import stage_scores, weight_histogram
from torchopt.report.summary import RunReport


def write_html(report: RunReport, path: str | os.PathLike[str]) -> None:
    """Write the page of a run's report (the dict of `report.json`) to `path`, atomically.

    Raises:
        FileError: the file cannot be written.
    """
    write_text(path, render(report))


def render(report: RunReport) -> str:
    """Return the page of a run's report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchopt.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["size"] = _size
    score = report["score"]
    largest = sorted((layer for layer in report["layers"] if layer.get("histogram")), key=lambda x: -_count(x))
    return environment.get_template("run.html.j2").render(
        report=report,
        layers=[_bars(layer) for layer in report["layers"]],
        integer=len(report["placement"]["integer"]),
        all_layers=len(report["placement"]["integer"]) + len(report["placement"]["float"]),
        stages=stage_scores(score.get("stages", []), score["baseline"]),
        histograms=[weight_histogram(layer) for layer in largest[:2]],
    )


def _bars(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with the lengths of its bars, in percent: float bytes are the whole."""
    count = _count(layer)
    return layer | {"count": count, "share": 100 * layer["bytes"] / (4 * count), "dense": 4 * count}


def _count(layer: dict[str, Any]) -> int:
    count = 1
    for size in layer["shape"]:
        count *= size
    return count


def _size(size_bytes: float) -> str:
    """Bytes in the unit that keeps three digits."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000 or unit == "MB":
            return f"{size_bytes:.3g} {unit}" if size_bytes < 1000 else f"{size_bytes:,.0f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")
