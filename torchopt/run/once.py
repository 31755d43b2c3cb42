"""One network without a recipe: quantize it, compare with the float network, write the file, compare that with what was written.

Two questions are answered apart. What did quantization do? The file's outputs are compared with the float network's, on samples that
calibration did not see, and both are scored by the user's own function. Is the file what was made? Its weights and outputs are compared
with the quantized network's. The file gets its name last, so that a refusal leaves nothing.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchopt.compress.one_shot import one_shot
from torchopt.data.samples import Given, count
from torchopt.errors import DataError, TargetError
from torchopt.export import ExportResult, OrtFiles, export, to_ort
from torchopt.io.files import atomic_path
from torchopt.network.batches import Batch, model_inputs, pieces
from torchopt.network.structure import leaves
from torchopt.network.surgery import evaluating
from torchopt.onnx_to_onnx.likeness import Likeness, liken
from torchopt.quantize import Quantize
from torchopt.rules import Rule
from torchopt.runtime import Placement, Verdict, inspect, session, verify
from torchopt.runtime.feed import feed_of_batch
from torchopt.runtime.inputs import run

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The user's own score: of the float network, of the quantized one, and how much worse that is, in the score's units."""

    name: str
    before: float
    after: float
    drop: float

    def __str__(self) -> str:
        return f"{self.name}: {self.before:.6g} in float, {self.after:.6g} quantized, {self.drop:.6g} worse"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was written and how it compares.

    Attributes:
        data: how the data was understood.
        export: the file.
        ort: what was made of it in ORT format, or None.
        against_float: the file's outputs beside the float network's.
        verify: the file beside the network that it was made of.
        placement: what runs as integers.
        score: the user's own, or None.
    """

    data: str
    export: ExportResult
    ort: OrtFiles | None
    against_float: Likeness
    verify: Verdict
    placement: Placement
    score: Score | None

    def __str__(self) -> str:
        lines = [
            f"data: {self.data}",
            str(self.ort or self.export),
            f"against the float network: {_likeness(self.against_float)}",
            *([] if self.score is None else [f"score, {self.score}"]),
            f"the file against the network that it holds: {self.verify}",
            str(self.placement),
        ]
        return "\n".join(lines)


def quantize_once(
    model: nn.Module,
    recipe: Quantize | None,
    given: Given,
    out: Path,
    *,
    target: str = "ort-x86",
    evaluate: Evaluate | None = None,
    name: str = "",
    max_drop: float | None = None,
    lower: bool = False,
    **how: Any,
) -> Outcome:
    """Quantize `model`, write `out`, and compare both ways.

    Args:
        model: a trained network; it is not touched.
        recipe: how; None writes the network as it is.
        given: data: every second sample calibrates, the others are compared on.
        out: the file; one that ends in .ort is in ORT format.
        target: the runtime aimed at.
        evaluate: the user's score of a network.
        name: of that function.
        max_drop: how much worse the score may become; layers stay float until it is kept.
        lower: a lower score is better.
        how: `export`'s options.

    Raises:
        TorchoptError: of `one_shot`, `export` and `verify`; DataError where the score is no number; TargetError where it drops too far.
    """
    seen, unseen = given.halves() if recipe is not None and recipe.mode == "static" else (given.batches, given.batches)
    example = example_of(model, given.batches[0])
    signed = None if evaluate is None else _signed(evaluate, name, -1.0 if lower else 1.0)
    before = None if signed is None else signed(model)
    final = _made(model, recipe, seen, example, target, signed, before, max_drop)
    score = None
    if signed is not None and before is not None:
        after, sign = signed(final), -1.0 if lower else 1.0
        score = Score(name=name, before=sign * before, after=sign * after, drop=before - after)
        if max_drop is not None and score.drop > max_drop:
            raise TargetError(
                f"--max-drop: got {max_drop:g}; {score}; allow more, more bits, or --observer and --rounding others"
            )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        written = replace(export(final, example, file, target=target, **how), path=out)
        pieces_ = [piece for batch in unseen for piece in pieces(batch, 32 if how.get("dynamic_batch", True) else 1)]
        halves = recipe is not None and recipe.mode == "static" and given.samples > 1
        against = _against(model, file, pieces_, "not calibrated on" if halves else "given")
        verdict, placement = verify(final, file, pieces_), inspect(file)
        ort = to_ort(file, out) if out.suffix == ".ort" else None
        if ort is None:
            with atomic_path(out) as temporary:
                shutil.copyfile(file, temporary)
    told = f"{given.told}; {_split(seen, unseen)}" if halves else given.told
    return Outcome(data=told, export=written, ort=ort, against_float=against, verify=verdict, placement=placement, score=score)


def example_of(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
    """Return one sample of a batch as forward's positional arguments.

    Raises:
        DataError: it leaves out an argument before one that it gives.
    """
    args, kwargs = model_inputs(model, next(iter(pieces(batch, 1))))
    if not kwargs:
        return args
    names = [p for p in signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    last = max((i for i, p in enumerate(names) if p.name in kwargs), default=-1)
    wrong = [name for name in kwargs if name not in {p.name for p in names[: last + 1]}]
    missing = [p.name for p in names[: last + 1] if p.name not in kwargs and p.default is p.empty]
    if wrong or missing:
        what = f"no {missing[0]!r}" if missing else f"{wrong[0]!r}, which is no positional argument"
        raise DataError(f"data: a batch gives {what}; {type(model).__name__} takes {', '.join(p.name for p in names)}")
    return tuple(kwargs.get(p.name, p.default) for p in names[: last + 1])


def _made(
    model: nn.Module,
    recipe: Quantize | None,
    seen: Sequence[Batch],
    example: tuple[Any, ...],
    target: str,
    score: Evaluate | None,
    before: float | None,
    max_drop: float | None,
) -> nn.Module:
    """The quantized network; where its score drops too far, with as few layers left float as bring it back."""
    if recipe is None:
        return model
    final = one_shot(model, [Rule("*", quantize=recipe)], seen, example_inputs=example, target=target)
    if score is None or before is None or max_drop is None or before - score(final) <= max_drop:
        return final
    rules = [Rule("*", quantize=replace(recipe, fallback="auto"))]
    return one_shot(model, rules, seen, example_inputs=example, target=target, evaluate=score, max_drop=max_drop)


def _signed(evaluate: Evaluate, name: str, sign: float) -> Evaluate:
    """The score with higher for better; of a copy, which the user's function may change."""

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        found = evaluate(copy.deepcopy(model).eval())
        number = float(found) if isinstance(found, int | float | np.generic) or getattr(found, "ndim", None) == 0 else math.nan
        if not math.isfinite(number):
            raise DataError(f"--evaluate: {name} returned {str(found)[:80]}; a finite number is needed")
        return sign * number

    return score


@torch.no_grad()
def _against(model: nn.Module, file: Path, batches: Sequence[Batch], inputs: str) -> Likeness:
    opened, found, samples = session(file), [], 0
    with evaluating(model):
        for batch in batches:
            theirs = [np.asarray(y) for y in run(opened, feed_of_batch(model, opened, batch, str(file)), str(file))]
            args, kwargs = model_inputs(model, batch)
            ours = [y.detach().cpu() for _, y in leaves(model(*args, **kwargs)) if isinstance(y, torch.Tensor)]
            found.append(([(y.float() if y.is_floating_point() else y).numpy() for y in ours], theirs))
            samples += count(batch)
    return liken(found, "the file", samples=samples, inputs=inputs)


def _split(seen: Sequence[Batch], unseen: Sequence[Batch]) -> str:
    return f"calibrated on {sum(map(count, seen))} of them, compared on the other {sum(map(count, unseen))}"


def _likeness(found: Likeness) -> str:
    parts = [] if found.agreement is None else [f"agreement {found.agreement:.1%}"]
    parts += [] if found.sqnr_db is None else [f"SQNR {found.sqnr_db:.1f} dB"]
    return f"{', '.join(parts) or 'no output to compare'}, of {found.samples} samples {found.inputs}"
