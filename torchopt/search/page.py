"""The page of a search: the front as a picture that answers to the pointer, the choice, the heat map, the reasons; no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from torchopt.search.choices import Option
from torchopt.search.layers.table import Sensitivity, heat_map

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 340, 70, 46
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color-scheme: light dark }
h1 { font-weight: 500 } svg { max-width: 100% } td, th { text-align: left; padding: 2px 12px 2px 0; vertical-align: top }
circle { cursor: pointer } circle:hover { stroke: currentColor; stroke-width: 3 } .scroll { overflow-x: auto }
pre { white-space: pre-wrap }
"""
SCRIPT = """
const told = document.getElementById("told");
document.querySelectorAll("circle[data-text]").forEach(dot => ["mouseenter", "click"].forEach(
  event => dot.addEventListener(event, () => { told.textContent = dot.dataset.text; })));
"""


def page(found: Mapping[str, Any], sensitivity: Sensitivity, chosen: Mapping[str, Option]) -> str:
    """Return the page.

    Args:
        found: what `SearchResult.to_dict` gives.
        sensitivity: what single layers cost.
        chosen: the option of each layer.
    """
    point, whole = found["chosen"], found["float"]
    times = f"{point['bytes']:,} bytes, {whole['bytes'] / point['bytes']:.1f} × smaller than float"
    head = f"{times}; {html.escape(found['units'])} {point['score']:.4f} (float {whole['score']:.4f})"
    rows = "".join(f"<tr><td>{html.escape(layer)}</td><td>{html.escape(text)}</td></tr>" for layer, text in found["why"].items())
    left = "".join(f"<li>{html.escape(text)}</li>" for text in found["left"])
    return "".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Search: {times}</title><style>{STYLE}</style>',
            f"<h1>{head}</h1><h2>Every point that was measured</h2>{front(found)}<pre id=told>Point at a dot to see its rules.</pre>",
            f"<h2>What each layer got, and why</h2><table>{rows}</table>",
            f"<h2>Left</h2><ul>{left}</ul>" if left else "",
            f'<h2>Noise at the outputs, dB</h2><div class="scroll">{heat_map(sensitivity, dict(chosen))}</div>',
            f"<script>{SCRIPT}</script></html>\n",
        ]
    )


def front(found: Mapping[str, Any]) -> str:
    """Return the points as inline SVG: bytes to the right, the score upward; the front is joined, the choice is filled."""
    points = found["tried"]
    low, high = _ends([p["score"] for p in [*found["front"], found["float"]]])
    first, last = _ends([float(p["bytes"]) for p in points])

    def at(p: Mapping[str, Any]) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 20) * (p["bytes"] - first) / (last - first)
        y = 16 + (HEIGHT - BOTTOM - 16) * (high - max(low, p["score"])) / (high - low)
        return x, y

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, found["front"]))
    float_y = at({"bytes": first, "score": found["float"]["score"]})[1]
    marks: list[tuple[float, float, str, str]]
    marks = [(LEFT - 6, at({"bytes": first, "score": s})[1] + 4, "end", f"{s:.4g}") for s in (low, high)]
    marks += [(at({"bytes": b, "score": low})[0], HEIGHT - 26, "middle", f"{b:,.0f}") for b in (first, last)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-size="12" fill="currentColor">',
        f'<polyline points="{line}" fill="none" stroke="#0f8b8d" stroke-width="2"/>',
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{float_y:.1f}" y2="{float_y:.1f}" stroke="#7b8794" stroke-dasharray="3 4"/>',
        f'<text x="{WIDTH - 4}" y="{float_y - 4:.1f}" text-anchor="end">float, {found["float"]["bytes"]:,} bytes</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">bytes of the file</text>',
        *(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in marks),
    ]
    return "".join([*parts, *(_dot(p, at(p), p == found["chosen"]) for p in points), "</svg>"])


def _dot(point: Mapping[str, Any], at: tuple[float, float], chosen: bool) -> str:
    layers = "\n".join(f"{layer}: {option}" for layer, option in point["options"].items())
    text = html.escape(f"{point['bytes']:,} bytes, score {point['score']:.4f}\n{layers}", quote=True)
    fill = "#0f8b8d" if chosen else "#9aa5b1"
    short = html.escape(f"{point['bytes']:,} bytes, {point['score']:.4f}")
    circle = f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{7 if chosen else 5}" fill="{fill}" data-text="{text}">'
    return f"{circle}<title>{short}</title></circle>"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low) * 0.01 - 1e-9, high + abs(high) * 0.01 + 1e-9)
