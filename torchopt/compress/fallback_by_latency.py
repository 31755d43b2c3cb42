"""`Quantize(fallback="auto")`: integers only where ONNX Runtime is faster with them, by measurement.

The network is exported as it is and with integers in all layers that the rules quantize, and both are timed in turns. Where integers
lose, by more than the noise of the measurement and than their smaller file is worth, the kinds of layers (convolutions, depthwise
convolutions, linear layers) are tried in every combination, and the fastest one is kept; where none pays, nothing is quantized. Scales do
not change latency, so the example inputs calibrate the trials.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchopt.errors import StateError
from torchopt.export import export
from torchopt.io.progress import track
from torchopt.network.weights import Skipped
from torchopt.rules import Assigned, Rule, assign, without_grids
from torchopt.runtime import benchmark
from torchopt.runtime.benchmark import Row

REPEATS = 15
WORTH = 0.2  # of float's time, for all of its bytes: a file of a quarter may take 15 % longer
Build = Callable[[Sequence[Rule]], nn.Module]


def faster_rules(
    model: nn.Module, rules: Sequence[Rule], example_inputs: tuple[Any, ...] | None, target: str, quantized: Build
) -> tuple[list[Rule], list[Skipped]]:
    """Return the rules with integers left out where they cost latency, and what was left out.

    Args:
        model: the float network; it is not touched.
        rules: as for `prepare`; those without fallback="auto" stay as they are.
        example_inputs: one call's arguments, tensors.
        target: the runtime that the files are written for; they are timed in ONNX Runtime on this machine.
        quantized: makes the finalized model that rules lead to.

    Raises:
        StateError: example inputs are missing.
    """
    asked = [a for a in assign(model, rules) if a.rule.quantize is not None and a.rule.quantize.fallback == "auto"]
    if not asked:
        return list(rules), []
    if example_inputs is None:
        raise StateError("prepare: fallback='auto' times the network; give example_inputs=(x,), one call's arguments")
    kinds: dict[str, list[Assigned]] = {}
    for found in asked:
        kinds.setdefault(_kind(found), []).append(found)

    def floats(kept: tuple[str, ...]) -> list[str]:
        return [a.weight.name for kind in kinds if kind not in kept for a in kinds[kind]]

    choices = {kept: without_grids(rules, asked, floats(kept)) for kept in _subsets(list(kinds))}
    with tempfile.TemporaryDirectory() as name:
        kept, ratio = _fastest(model, choices, example_inputs, target, quantized, Path(name))
    reason = f"integers in {' and '.join(kinds)} take {ratio:.2f} × the time of float in ONNX Runtime on this machine; left float"
    left = floats(kept)
    return without_grids(rules, asked, left), [Skipped(name=n, technique="quantize", reason=reason) for n in left]


def _fastest(
    model: nn.Module, choices: dict[tuple[str, ...], list[Rule]], x: tuple[Any, ...], target: str, quantized: Build, folder: Path
) -> tuple[tuple[str, ...], float]:
    """Return the kinds whose integers are fastest, () for none, and the latency ratio of all of them together."""
    first = folder / "float.onnx"
    export(model.eval(), x, first, target=target, pack=False)

    def rows(some: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Row]:
        paths = {}
        for kept in some:
            paths[kept] = folder / f"{len(list(folder.iterdir()))}.onnx"
            export(quantized(choices[kept]).eval(), x, paths[kept], target=target, pack=False)
        timing = benchmark([first, *paths.values()], repeats=REPEATS, progress=False)
        return dict(zip(paths, timing.rows[1:], strict=True))

    size = first.stat().st_size
    everything = next(iter(choices))
    whole = rows([everything])[everything]
    if _cost(whole, size) <= 1 or len(choices) == 1:
        return (everything if _cost(whole, size) <= 1 else ()), whole.ratio
    found = {kept: _cost(row, size) for kept, row in rows(track(list(choices)[1:], "fallback")).items()}
    best = min(found, key=lambda kept: found[kept])
    return (best if found[best] <= 1 else ()), whole.ratio


def _cost(row: Row, float_bytes: int) -> float:
    """Time over float's, above 1 where integers do not pay: the lower quartile, since noise must not decide, less what bytes are worth."""
    return row.ratio_low - WORTH * (1 - row.size_bytes / float_bytes)


def _subsets(kinds: list[str]) -> list[tuple[str, ...]]:
    """All combinations but the empty one, the largest first."""
    return [c for size in range(len(kinds), 0, -1) for c in itertools.combinations(kinds, size)]


def _kind(found: Assigned) -> str:
    module = found.weight.module
    if found.weight.depthwise:
        return "depthwise convolutions"
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return (
        "convolutions" if convolution else "linear layers" if isinstance(module, nn.Linear) else f"{type(module).__name__} layers"
    )
