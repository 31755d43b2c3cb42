"""`torchopt search`: the smallest, or the fastest, network that a limit allows; how far it is, said after each point."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from torchopt.cli.onnx_commands import as_json
from torchopt.cli.terminal import show
from torchopt.errors import ConfigError

if TYPE_CHECKING:
    from torchopt.search import Point


@click.command()
@click.argument("source")
@click.option("--out", required=True, metavar="DIR", help="Folder for the file, the recipe that makes it again, and the page.")
@click.option("--max-drop", type=float, metavar="X", help="How far the score may fall, in its own units: 0.005 is half a point.")
@click.option("--max-bytes", type=float, metavar="N", help="The most bytes of the file.")
@click.option("--max-latency-ms", type=float, metavar="MS", help="The longest time of one call in ONNX Runtime here.")
@click.option(
    "--objective", type=click.Choice(["size", "latency"]), default="size", show_default=True, help="What to make small."
)
@click.option("--trials", default=16, show_default=True, type=click.IntRange(3), help="Networks to make and measure, at most.")
@click.option("--target", default="ort-x86", show_default=True, help="The runtime aimed at.")
@click.option("--resume", is_flag=True, help="Go on with the search that lies in DIR.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
@as_json
def search(
    source: str,
    out: str,
    max_drop: float | None,
    max_bytes: float | None,
    max_latency_ms: float | None,
    objective: str,
    trials: int,
    target: str,
    resume: bool,
    settings: Sequence[str],
    as_json: bool,
) -> None:
    """Find the smallest network of SOURCE that keeps its score: a recipe, or module:function that returns model and batches."""
    from torchopt.search.folder import search_in_folder

    if not out.strip():
        raise ConfigError("--out: is empty; the name of what to write is needed")
    limits: dict[str, Any] = {"max_drop": max_drop, "max_bytes": max_bytes, "max_latency_ms": max_latency_ms}
    found = search_in_folder(
        source,
        out,
        resume=resume,
        settings=settings,
        said=_Told(trials),
        objective=objective,
        trials=trials,
        target=target,
        **limits,
    )
    show(found.to_dict(), f"{found}\n{out}: model.onnx, searched.yaml, search.json, report.html", as_json)


class _Told:
    """Says on stderr what each point brought, the smallest so far by score, and how long the others may take."""

    def __init__(self, most: int) -> None:
        self.most, self.count, self.started = most, 0, time.monotonic()

    def __call__(self, point: Point) -> None:
        self.count += 1
        left = (time.monotonic() - self.started) / self.count * (self.most - self.count)
        drawn = "" if point.latency_ms is None else f", {point.latency_ms:.3f} ms"
        text = f"point {self.count} of at most {self.most}: {point.bytes:,} bytes, score {point.score:.4f}{drawn}"
        click.echo(f"{text}; at most {left / 60:.0f} min left", err=True)
