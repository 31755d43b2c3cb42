"""The pictures of a run's page: vector graphics on a transparent ground, in colours that hold on light and on dark."""

from __future__ import annotations

import io
import itertools
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and read by screen readers
    "svg.hashsalt": "torchopt",  # the same run draws the same bytes
}
BEFORE, AFTER, INK = "#9aa5b1", "#0f8b8d", "#7b8794"


def stage_scores(stages: list[dict[str, Any]], baseline: float) -> str:
    """Draw the score after each epoch, stage by stage, as SVG; an empty string where there is nothing to draw."""
    if len(stages) < 2:
        return ""
    figure = Figure(figsize=(7.2, 2.8))
    axes = figure.subplots()
    names = list(dict.fromkeys(s["name"] for s in stages))
    for number, name in enumerate(names):
        points = [(i, 100 * s["score"]) for i, s in enumerate(stages, 1) if s["name"] == name]
        color = BEFORE if number == 0 else AFTER
        axes.plot([p[0] for p in points], [p[1] for p in points], marker=".", color=color, label=name, linewidth=2)
    axes.axhline(100 * baseline, color=INK, linewidth=0.8, linestyle=":")
    scores = sorted(100 * s["score"] for s in stages)
    axes.set_ylim(max(0.0, scores[len(scores) // 10] - 3), min(100.5, scores[-1] + 1.5))
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return _svg(figure, axes)


def weight_histogram(layer: dict[str, Any]) -> str:
    """Draw how the nonzero weights of a layer are spread, with the shared values it learned, as SVG."""
    data = layer.get("histogram")
    if not data:
        return ""
    figure = Figure(figsize=(7.2, 2.4))
    axes = figure.subplots()
    edges, counts = data["edges"], data["counts"]
    axes.bar(edges[:-1], counts, width=[b - a for a, b in itertools.pairwise(edges)], align="edge", color=BEFORE)
    for value in data["values"] or []:
        axes.axvline(value, color=AFTER, linewidth=1.2, ymax=0.06)
        axes.plot([value], [0], marker="^", color=AFTER, markersize=5, clip_on=False, zorder=5)
    axes.set_xlabel(f"nonzero weights of {layer['name']}")
    axes.set_ylabel("count")
    return _svg(figure, axes)


def _svg(figure: Figure, axes: Axes) -> str:
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    figure.tight_layout()
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
