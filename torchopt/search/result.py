"""What a search found: the network, the rules and the recipe that make it again, the front, and a line of reasons a layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import nn

from torchopt.io.files import write_text
from torchopt.rules import Rule
from torchopt.search.choices import Option
from torchopt.search.composed import Point
from torchopt.search.layers.table import Row, Sensitivity
from torchopt.search.page import page


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The answer of `search`.

    Attributes:
        model: the compressed network, plain; `torchopt.export` writes the file of `point.bytes`.
        point: the choice: its rules, bytes, score, noise, latency.
        front: all points that were measured and that no other beats in bytes and score, the smallest first.
        tried: every point, in the order of the search.
        sensitivity: what single layers cost.
        float_bytes: of the float network's file.
        float_score: its score.
        float_latency_ms: its latency; None where that was not asked for.
        units: of the score.
        left: what was left alone or not tried, and why.
        seconds: that it took.
    """

    model: nn.Module = field(repr=False)
    point: Point
    front: list[Point]
    tried: list[Point] = field(repr=False)
    sensitivity: Sensitivity = field(repr=False)
    float_bytes: int
    float_score: float
    float_latency_ms: float | None
    units: str
    left: list[str]
    seconds: float

    @property
    def rules(self) -> list[Rule]:
        """The rules that `one_shot` makes `model` by."""
        return self.point.rules

    @property
    def recipe(self) -> str:
        """The stage of a recipe, as YAML, that does the same."""
        stage = {"name": "searched", "compress": [plain_rule(rule) for rule in self.rules]}
        return yaml.safe_dump({"stages": [stage]}, sort_keys=False, width=120, default_flow_style=None)

    @property
    def why(self) -> dict[str, str]:
        """One line a layer: what was chosen, what it costs and saves, what the next smaller option would."""
        rows = self.sensitivity.layers()
        return {layer: explained(rows[layer], option) for layer, option in self.point.chosen.items()}

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, without the network."""
        return {
            "chosen": plain_point(self.point),
            "front": [plain_point(p) for p in self.front],
            "tried": [plain_point(p) for p in self.tried],
            "float": {"bytes": self.float_bytes, "score": self.float_score, "latency_ms": self.float_latency_ms},
            "units": self.units,
            "why": self.why,
            "left": self.left,
            "seconds": round(self.seconds, 1),
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with the front, the choice, the heat map and the reasons, atomically; it needs no network.

        Raises:
            FileError: the file cannot be written.
        """
        write_text(path, page(self.to_dict(), self.sensitivity, self.point.chosen))

    def __str__(self) -> str:
        drop = self.float_score - self.point.score
        first = f"{self.point.bytes:,} bytes, {self.float_bytes / self.point.bytes:.1f} × smaller than float; {self.units} "
        lines = [f"{first}{self.point.score:.4f}, {drop:+.4f} below float's; {len(self.tried)} points in {self.seconds:.0f} s"]
        lines += [f"  {layer}: {text}" for layer, text in self.why.items()]
        return "\n".join([*lines, *(f"  left: {text}" for text in self.left)])


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats: fewer bytes at no lower score (and no more time where that was measured)."""

    def costs(p: Point) -> tuple[float, ...]:
        return (p.bytes, -p.score, p.latency_ms or 0.0)

    def beaten(p: Point) -> bool:
        return any(all(a <= b for a, b in zip(costs(o), costs(p), strict=True)) and costs(o) != costs(p) for o in points)

    unique = {costs(p): p for p in points if not beaten(p)}
    return sorted(unique.values(), key=lambda p: p.bytes)


def plain_point(point: Point) -> dict[str, Any]:
    """A point as JSON holds it."""
    return {
        "bytes": point.bytes,
        "score": point.score,
        "loss": point.loss if math.isfinite(point.loss) else None,
        "latency_ms": point.latency_ms,
        "predicted_bytes": point.predicted_bytes,
        "predicted_ms": point.predicted_ms,
        "rules": [plain_rule(rule) for rule in point.rules],
        "options": {layer: str(option) for layer, option in point.chosen.items()},
    }


def plain_rule(rule: Rule) -> dict[str, Any]:
    """A rule as a recipe holds it.

    Example:
        >>> from torchopt import Prune, Quantize
        >>> plain_rule(Rule("a.weight", prune=Prune(schedule=0.5), quantize=Quantize()))
        {'match': 'a.weight', 'prune': {'schedule': 0.5, 'score': 'magnitude', 'include_depthwise': False}, 'quantize': {}}
    """
    found: dict[str, Any] = {"match": rule.match}
    if rule.prune is not None:
        final = rule.prune.timing.final
        found["prune"] = {"schedule": final, "score": rule.prune.score, "include_depthwise": rule.prune.include_depthwise}
    if rule.cluster is not None:
        found["cluster"] = {"n_clusters": rule.cluster.n_clusters, "include_depthwise": rule.cluster.include_depthwise}
    if rule.quantize is not None:
        asked = {"mode": (rule.quantize.mode, "static"), "weight_bits": (rule.quantize.weight_bits, 8)}
        found["quantize"] = {name: value for name, (value, default) in asked.items() if value != default}
    return found


def explained(rows: Sequence[Row], option: Option) -> str:
    """Why a layer has its option, in one line."""
    chosen = next(row for row in rows if row.option == option)
    whole = 4 * math.prod(chosen.shape)
    text = f"{option}: {chosen.decibels:.0f} dB of noise at the outputs" if option.bits is not None else "float: no noise"
    text += f", {_size(chosen.bytes)} instead of {_size(whole)}"
    smaller = [row for row in rows if row.bytes < chosen.bytes and row.loss > chosen.loss]
    if not smaller:
        return f"{text}; nothing tried is smaller"
    best = min(smaller, key=lambda row: (row.loss - chosen.loss) / (chosen.bytes - row.bytes))
    return f"{text}; {best.option} would save {_size(chosen.bytes - best.bytes)} more, at {best.decibels:.0f} dB"


def _size(count: float) -> str:
    return f"{count:.0f} B" if count < 1000 else f"{count / 1000:.1f} kB"
