"""Search: one call from "at most this much worse" to the smallest network that is not, with the whole front and the reasons.

sensitivity → solve → make, score, weigh → correct → solve …
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import torchopt
from torchopt.errors import ConfigError, StateError
from torchopt.export import export
from torchopt.network.batches import Batch, arguments
from torchopt.process.ordinary import alone
from torchopt.process.random_state import random_state_kept
from torchopt.runtime import benchmark
from torchopt.search.choices import Choices
from torchopt.search.composed import Composer, Point, Train
from torchopt.search.goals import Search, to_bytes, to_drop, to_latency
from torchopt.search.layers.journal import Journal, digest, digest_of, folder_of
from torchopt.search.layers.latency import latencies
from torchopt.search.layers.samples import Samples, split
from torchopt.search.layers.table import Sensitivity
from torchopt.search.predict import Model
from torchopt.search.result import SearchResult, pareto
from torchopt.search.score import Score, scored
from torchopt.search.sensitivity import Evaluate, first_sample, measured, plain_of

OBJECTIVES = {"size": "bytes", "latency": "latency"}
SHARE = 0.2  # of the full training, for candidates
TRIALS = 16


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """What was asked for."""

    drop: float | None
    bytes: float | None
    latency: float | None
    objective: str

    @property
    def timed(self) -> bool:
        return self.latency is not None or self.objective == "latency"


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The goal, and how to look for it."""

    goal: _Goal
    choices: Choices
    target: str
    trials: int
    cache: Path | None
    folder: str | os.PathLike[str] | None


@alone()
@random_state_kept()
def search(
    model: nn.Module,
    *,
    batches: Iterable[Batch],
    max_drop: float | None = None,
    max_bytes: float | None = None,
    max_latency_ms: float | None = None,
    evaluate: Evaluate | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    objective: str = "size",
    train: Train | None = None,
    choices: Choices | None = None,
    target: str = "ort-x86",
    trials: int = TRIALS,
    cache: str | os.PathLike[str] | bool = True,
    folder: str | os.PathLike[str] | None = None,
    said: Callable[[Point], object] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Find what each layer should become so that the whole network is as small, or as fast, as one limit allows.

    Args:
        model: a trained network; it is not touched.
        batches: a few hundred samples: one half shows the solver what layers read, the other is held back to judge by.
        max_drop: how far the score may fall below the float network's, in its own units: 0.005 is half a point of an accuracy in [0, 1].
        max_bytes: of the file; the best network that fits is looked for.
        max_latency_ms: of one call in ONNX Runtime on this machine; the best network that keeps it is looked for.
        evaluate: a score of a model, higher for better; left out, the share of held-back samples whose answer stays float's.
        example_inputs: one call's arguments; the first sample where left out.
        objective: what becomes small under `max_drop`: "size" or "latency".
        train: `train(prepared, share)` fine-tunes in place, with `torchopt.step`: a fifth of the course for candidates, all for the winner.
        choices: what each layer is tried with.
        target: as for `export`.
        trials: whole networks to make and measure, at most.
        cache: where what single layers cost is kept; as for `sensitivity`.
        folder: where measured points are kept, so that a search that was killed goes on; give it another one for another `evaluate`.
        said: called with each point when it is measured.
        progress: show progress bars on stderr.

    Returns:
        The network, its rules, the front, and why.

    Raises:
        ConfigError: no limit, or several; one that is out of its range; an unknown objective.
        DataError: too few samples; a score that is not finite, better for a ruined network, or so noisy that it hides `max_drop`.
        TargetError: the limit cannot be met; the nearest point is told.

    Example:
        >>> import torch
        >>> few, net = Choices(sparsities=(), values=(16,)), nn.Sequential(nn.Linear(256, 16))
        >>> found = search(net, max_drop=0.1, batches=torch.randn(128, 256), choices=few, cache=False, trials=3)
        >>> found.point.score >= 0.9 and found.point.bytes < found.float_bytes / 2
        True
    """
    goal = _checked(max_drop, max_bytes, max_latency_ms, objective, trials)
    plain = plain_of(model)
    samples = split(plain, batches, arguments(example_inputs))
    example = _example(samples, arguments(example_inputs))
    asked = _Asked(goal=goal, choices=choices or Choices(), target=target, trials=trials, cache=folder_of(cache), folder=folder)
    return _searched(plain, samples, example, evaluate, train, asked, said or (lambda point: None), progress=progress)


def _example(samples: Samples, given: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """One call's arguments.

    Raises:
        StateError: they are not known.
    """
    example = given or first_sample(samples)
    if example is None:
        raise StateError("search: batches are dicts, whose order of arguments is not known; give example_inputs=(x,)")
    return example


def _searched(
    plain: nn.Module,
    samples: Samples,
    example: tuple[Any, ...],
    evaluate: Evaluate | None,
    train: Train | None,
    asked: _Asked,
    said: Callable[[Point], object],
    *,
    progress: bool,
) -> SearchResult:
    """Measure layers, then points, towards the goal."""
    started, goal = time.monotonic(), asked.goal
    score = scored(plain, evaluate, samples, goal.drop)
    found = measured(plain, samples, example, asked.choices, folder=asked.cache, progress=progress)
    if goal.timed:
        found = latencies(plain, found, example, asked.cache, progress=progress)
    composer = Composer(
        plain,
        samples,
        example,
        score,
        target=asked.target,
        mode="static",
        journal=_journal(asked.folder, plain, samples, score),
        timed=goal.timed,
        train=train,
        share=1.0 if train is None else SHARE,
    )
    minimize = OBJECTIVES[goal.objective]
    costs = Model.of(found)
    state = Search(composer=composer, model=costs, reference=score.reference, minimize=minimize, most=asked.trials, said=said)
    point = _reached(state, goal)
    if train is not None:
        point = _in_full(state, goal, point)
    size, latency = _float(plain, example, asked.target, timed=goal.timed)
    return SearchResult(
        model=composer.network(point.chosen),
        point=point,
        front=pareto(state.points),
        tried=state.points,
        sensitivity=found,
        float_bytes=size,
        float_score=score.reference,
        float_latency_ms=latency,
        units=score.units,
        left=_left(found, state, point, score, goal),
        seconds=time.monotonic() - started,
    )


def _checked(drop: float | None, size: float | None, latency: float | None, objective: str, trials: int) -> _Goal:
    """Refuse what cannot be meant.

    Raises:
        ConfigError: no goal, several, one out of its range, an unknown objective.
    """
    given = {"max_drop": drop, "max_bytes": size, "max_latency_ms": latency}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ConfigError(f"search: got {' and '.join(named) or 'no limit'}; exactly one of {', '.join(given)} is needed")
    value = given[named[0]]
    least = 0 if named[0] == "max_drop" else 1e-9
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        right = "0 or more, in the units of evaluate" if named[0] == "max_drop" else "a number above 0"
        raise ConfigError(f"search: {named[0]}={value!r}; {right} is needed")
    if objective not in OBJECTIVES:
        raise ConfigError(f"search: objective={objective!r}; 'size' or 'latency' is needed")
    if objective == "latency" and drop is None:
        raise ConfigError(
            f"search: objective='latency' goes with max_drop; {named[0]} is a limit under which the best score is found"
        )
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 3:
        raise ConfigError(f"search: trials={trials!r}; at least 3 are needed: the largest, the smallest, and one between")
    return _Goal(drop=drop, bytes=size, latency=latency, objective=objective)


def _journal(folder: str | os.PathLike[str] | None, plain: nn.Module, samples: Samples, score: Score) -> Journal:
    """The points of this network, these samples and this score; a noisy score is known by its name only."""
    if folder is None:
        return Journal(None)
    reference = score.reference if score.spread == 0 else "noisy"
    about = digest(digest_of(plain), samples.learn, samples.judge, score.units, reference, torchopt.__version__)
    return Journal(Path(folder) / f"points-{about}.jsonl")


def _reached(state: Search, goal: _Goal) -> Point:
    """The point that the goal asks for."""
    if goal.drop is not None:
        return to_drop(state, goal.drop)
    if goal.bytes is not None:
        return to_bytes(state, goal.bytes)
    assert goal.latency is not None
    return to_latency(state, goal.latency)


def _in_full(state: Search, goal: _Goal, point: Point) -> Point:
    """Train the winner in full; where it then misses the drop, the next larger that passed takes its place."""
    passed = [p for p in state.points if goal.drop is None or state.meets(p, goal.drop)]
    state.composer.share = 1.0
    for candidate in sorted(passed, key=lambda p: (p is not point, p.bytes)):
        trained = state.composer.point(candidate.chosen, (candidate.predicted_bytes, candidate.predicted_ms))
        state.points.append(trained)
        if goal.drop is None or state.meets(trained, goal.drop):
            return trained
    return state.points[-1]


def _float(plain: nn.Module, example: tuple[Any, ...], target: str, *, timed: bool) -> tuple[int, float | None]:
    """Bytes and latency of the float network's file."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "float.onnx"
        size = export(plain, example, path, target=target, pack=False).size_bytes
        return size, benchmark([path], repeats=20, progress=False).rows[0].latency_ms if timed else None


def _left(found: Sensitivity, state: Search, point: Point, score: Score, goal: _Goal) -> list[str]:
    """What was not done, and why."""
    said = [f"{row.layer}: {row.option} cannot be had ({row.reason})" for row in found.rows if row.reason][:10]
    said += [f"{layer}: stays float" for layer, option in point.chosen.items() if option.bits is None]
    if score.spread:
        said.append(f"evaluate varies by {score.spread:.2g} from call to call; the mean of {score.repeats} calls decided")
    smaller = [p for p in state.points if p.bytes < point.bytes and goal.drop is not None and not state.meets(p, goal.drop)]
    if smaller:
        nearest = max(smaller, key=lambda p: p.bytes)
        said.append(f"the next smaller point, of {nearest.bytes:,} bytes, drops {state.drop(nearest):.4g}")
    if len(state.points) >= state.most:
        said.append(f"the search ended after trials={state.most}; more may find a smaller one")
    return said
