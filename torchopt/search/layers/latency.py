"""The time that a layer takes in ONNX Runtime, by its kind and shape: measured once on a machine, and kept.

Layers of one kind and shape that read inputs of one shape take the same time, wherever they stand. So each such layer is exported by
itself, float and in 8 bits, and both files are timed in turns. Zeros and shared values change no time: they are decoded at load.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from torchopt.compress.one_shot import one_shot
from torchopt.errors import TorchoptError
from torchopt.export import export
from torchopt.io.progress import track
from torchopt.network.copies import copied
from torchopt.network.weights import Weight, weights
from torchopt.quantize import Quantize
from torchopt.rules import Rule
from torchopt.runtime import benchmark
from torchopt.search.layers.journal import Journal, digest
from torchopt.search.layers.table import Sensitivity

REPEATS = 15


def latencies(
    plain: nn.Module, found: Sensitivity, example: tuple[Any, ...] | None, folder: Path | None, *, progress: bool = True
) -> Sensitivity:
    """Return the rows with the time of each layer; None stays where a layer cannot be timed by itself.

    Args:
        plain: the float network.
        found: its rows.
        example: one call's arguments.
        folder: where times are kept; None is nowhere.
        progress: show a progress bar on stderr.
    """
    if example is None:
        return found
    journal = Journal(None if folder is None else folder / f"latency-{machine()}.jsonl")
    inputs = _inputs(plain, example)
    times = {}
    for weight in track(weights(plain), "latency", enabled=progress):
        if weight.module in inputs:
            times[weight.name] = _timed(weight, inputs[weight.module], journal)
    rows = []
    for row in found.rows:
        pair = times.get(row.layer, (None, None))
        rows.append(replace(row, latency_ms=pair[0] if row.option.bits is None else pair[1]))
    return replace(found, rows=rows)


def machine() -> str:
    """A name of this machine and its runtime: times of another are not taken for its own."""
    return digest(platform.machine(), platform.processor(), platform.node(), os.cpu_count(), onnxruntime.__version__)


def _inputs(plain: nn.Module, example: tuple[Any, ...]) -> dict[nn.Module, Tensor]:
    """What each layer reads first."""
    found: dict[nn.Module, Tensor] = {}

    def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found.setdefault(module, args[0].detach().clone())

    handles = [weight.module.register_forward_pre_hook(seen) for weight in weights(plain)]
    try:
        with torch.no_grad():
            plain(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _timed(weight: Weight, x: Tensor, journal: Journal) -> tuple[float | None, float | None]:
    """Milliseconds of a layer by itself, float and in 8 bits."""
    key = f"{weight.module} {tuple(x.shape)} {x.dtype}"
    known = journal.get(key)
    if known is not None:
        return known["float"], known["int8"]
    layer = nn.Sequential(copied(weight.module)).eval()
    with tempfile.TemporaryDirectory() as name:
        paths = {kind: Path(name) / f"{kind}.onnx" for kind in ("float", "int8")}
        _written(lambda: layer, x, paths["float"])
        _written(
            lambda: one_shot(layer, [Rule("*", quantize=Quantize())], [x], example_inputs=(x,), progress=False), x, paths["int8"]
        )
        there = [kind for kind, path in paths.items() if path.is_file()]
        rows = benchmark([paths[kind] for kind in there], repeats=REPEATS, progress=False).rows if there else []
    measured = {kind: row.latency_ms for kind, row in zip(there, rows, strict=True)}
    journal.put(key, {"float": measured.get("float"), "int8": measured.get("int8")})
    return measured.get("float"), measured.get("int8")


def _written(made: Callable[[], nn.Module], x: Tensor, path: Path) -> None:
    """Export what can be; a layer that no file holds has no time."""
    try:
        export(made().eval(), (x,), path, pack=False)
    except TorchoptError:
        path.unlink(missing_ok=True)
