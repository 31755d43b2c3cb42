"""The table of a sensitivity: a row a layer and option, as text, JSON, a data frame, and a heat map."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchopt.errors import ConfigError
from torchopt.io.files import write_text
from torchopt.io.importing import unnoticed
from torchopt.search.choices import Option
from torchopt.search.layers.sizes import Size

with unnoticed():
    from rich.console import Console
    from rich.table import Table

CELL, TOP, SIDE = 64, 96, 250
QUIET, LOUD = -60.0, 0.0  # dB: the ends of the scale of colours


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer under one option.

    Attributes:
        layer: the weight's name.
        shape: its shape.
        option: what was done with it.
        loss: noise over signal at the network's outputs, the other layers being float.
        bytes: what the weight takes in the packed file, without the functions that layers share.
        sizes: all forms that the packer may choose from.
        latency_ms: of such a layer in ONNX Runtime; None where that was not measured.
        score: by `evaluate`; None where none was given.
        reason: why the option cannot be had; empty where it can.
    """

    layer: str
    shape: tuple[int, ...]
    option: Option
    loss: float
    bytes: int
    sizes: list[Size] = field(repr=False)
    latency_ms: float | None = None
    score: float | None = None
    reason: str = ""

    @property
    def decibels(self) -> float:
        """The loss in dB: 0 is as much noise as signal, −60 a thousandth of its amplitude."""
        return 10 * math.log10(self.loss) if 0 < self.loss < math.inf else -math.inf if self.loss == 0 else math.inf

    def plain(self) -> dict[str, Any]:
        """As JSON and tables hold it."""
        return {
            "layer": self.layer,
            "shape": list(self.shape),
            "option": str(self.option),
            "sparsity": self.option.sparsity,
            "values": self.option.values,
            "bits": self.option.bits,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "bytes": self.bytes,
            "latency_ms": self.latency_ms,
            "score": self.score,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What `sensitivity` measured: its rows, and by how many samples."""

    rows: list[Row]
    samples: int

    def layers(self) -> dict[str, list[Row]]:
        """The rows by layer, in the network's order; those that cannot be had are left out."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.layer, [])
            if not row.reason and math.isfinite(row.loss):
                found[row.layer].append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"samples": self.samples, "rows": [row.plain() for row in self.rows]}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as JSON, atomically.

        Raises:
            FileError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("to_dataframe: pandas is not installed; install it, or use to_dict() or to_json(path)") from error
        return pandas.DataFrame([row.plain() for row in self.rows])

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the heat map as a page of its own, atomically; it needs no network.

        Raises:
            FileError: the file cannot be written.
        """
        title = "Noise at the outputs, layer by layer"
        page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><body style="font:14px sans-serif"><h1>{title}</h1>'
        write_text(path, f"{page}{heat_map(self)}</body>\n")

    def __str__(self) -> str:
        table = Table(title=f"noise at the outputs in dB and bytes in the file; {self.samples} samples")
        for name in ("layer", "option", "noise, dB", "bytes", "ms", "score"):
            table.add_column(name, justify="left" if name in ("layer", "option") else "right")
        for row in self.rows:
            extra = ["" if value is None else f"{value:.4g}" for value in (row.latency_ms, row.score)]
            table.add_row(row.layer, str(row.option), row.reason[:40] or f"{row.decibels:.1f}", f"{row.bytes:,}", *extra)
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def heat_map(found: Sensitivity, chosen: dict[str, Option] | None = None) -> str:
    """Return an inline SVG: a row a layer, a column an option, dark where the outputs suffer; what was chosen is framed.

    Example:
        >>> row = Row(layer="0.weight", shape=(2, 2), option=Option(), loss=1e-4, bytes=4, sizes=[])
        >>> heat_map(Sensitivity(rows=[row], samples=1)).count("<rect")
        1
    """
    options = list(dict.fromkeys(row.option for row in found.rows))
    layers = list(dict.fromkeys(row.layer for row in found.rows))
    width, height = SIDE + CELL * len(options), TOP + 22 * len(layers) + 8
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-size="11">']
    for place, option in enumerate(options):
        x = SIDE + CELL * place + CELL / 2
        parts.append(
            f'<text transform="translate({x:.0f},{TOP - 6}) rotate(-35)" fill="currentColor">{html.escape(str(option))}</text>'
        )
    for place, layer in enumerate(layers):
        parts.append(
            f'<text x="{SIDE - 8}" y="{TOP + 22 * place + 15}" text-anchor="end" fill="currentColor">{html.escape(layer)}</text>'
        )
    for row in found.rows:
        parts.append(_cell(row, options, layers, framed=chosen is not None and chosen.get(row.layer) == row.option))
    return "".join([*parts, "</svg>"])


def _cell(row: Row, options: Sequence[Option], layers: Sequence[str], *, framed: bool) -> str:
    x, y = SIDE + CELL * options.index(row.option), TOP + 22 * layers.index(row.layer)
    share = min(1.0, max(0.0, (row.decibels - QUIET) / (LOUD - QUIET)))
    color = "#eee" if row.reason else f"hsl({190 - 190 * share:.0f} 70% {88 - 38 * share:.0f}%)"
    told = row.reason or f"{row.decibels:.1f} dB, {row.bytes:,} bytes"
    text = "–" if row.reason or not math.isfinite(row.decibels) else f"{row.decibels:.0f}"
    frame = ' stroke="#000" stroke-width="2"' if framed else ""
    title = f"<title>{html.escape(f'{row.layer}, {row.option}: {told}')}</title>"
    rect = f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="20" rx="3" fill="{color}"{frame}>{title}</rect>'
    return f'{rect}<text x="{x + CELL / 2:.0f}" y="{y + 15}" text-anchor="middle" fill="#123" pointer-events="none">{text}</text>'
