"""The choice itself: one option a layer, at the least cost, under limits; HiGHS proves that there is no better one.

    minimize    Σ cost of what is chosen  +  Σ bytes of the functions that decode it, each once
    such that   one option a layer,  Σ noise ≤ a budget,  Σ bytes ≤ another,  Σ time ≤ a third

This is a multiple-choice knapsack with shared items, small enough for a mixed-integer solver: some thousand variables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from torchopt.search.choices import Option
from torchopt.search.layers.sizes import Size

GAP = 1e-4  # of the cost: how near to the best is proved


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One option of one layer: its noise, its time, and one form that its weight may take in the file."""

    layer: str
    option: Option
    loss: float
    size: Size
    latency: float = 0.0


def choose(
    candidates: Sequence[Candidate],
    *,
    minimize: str,
    loss: float = math.inf,
    bytes: float = math.inf,
    latency: float = math.inf,
) -> dict[str, Candidate] | None:
    """Return the best candidate of each layer, or None where the limits leave none.

    Args:
        candidates: all of them.
        minimize: "bytes", "loss" or "latency".
        loss: the most noise, all layers together.
        bytes: the most bytes, functions included.
        latency: the most time.

    Example:
        >>> few, many = Option(values=4), Option()
        >>> made = [Candidate(layer="a", option=o, loss=x, size=Size(own=n)) for o, x, n in ((few, 0.1, 10), (many, 0.0, 30))]
        >>> [str(choose(made, minimize="bytes", loss=limit)["a"].option) for limit in (0.2, 0.05)]
        ['4 values', '8 bits']
    """
    layers = {name: place for place, name in enumerate(dict.fromkeys(c.layer for c in candidates))}
    functions = {name: size for c in candidates for name, size in c.size.shared.items()}
    count, places = len(candidates), {name: len(candidates) + i for i, name in enumerate(functions)}
    own = {
        "bytes": np.array([*(float(c.size.own) for c in candidates), *map(float, functions.values())]),
        "loss": np.array([*(c.loss for c in candidates), *(0.0 for _ in functions)]),
        "latency": np.array([*(c.latency for c in candidates), *(0.0 for _ in functions)]),
    }
    one_each = coo_array(
        (np.ones(count), ([layers[c.layer] for c in candidates], range(count))), shape=(len(layers), len(own["loss"]))
    )
    limits = [LinearConstraint(one_each.tocsr(), 1, 1)]  # type: ignore[arg-type]
    for name, most in (("loss", loss), ("bytes", bytes), ("latency", latency)):
        if math.isfinite(most):
            scale = max(abs(most), 1e-12)
            limits.append(LinearConstraint(own[name][None] / scale, -np.inf, most / scale))
    needs = _needs(candidates, places, layers)
    if needs is not None:
        limits.append(LinearConstraint(needs, -np.inf, 0))  # type: ignore[arg-type]
    tie = own["bytes"] * (0 if minimize == "bytes" else 1e-6 * max(own[minimize].sum(), 1e-12) / max(own["bytes"].sum(), 1))
    goal = own[minimize] + tie
    found = milp(
        goal / max(goal.max(), 1e-30), constraints=limits, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": GAP}
    )  # type: ignore[call-overload]
    if found.x is None:
        return None
    return {c.layer: c for c, taken in zip(candidates, found.x[:count], strict=True) if taken > 0.5}


def _needs(candidates: Sequence[Candidate], places: Mapping[str, int], layers: Mapping[str, int]) -> object | None:
    """A row a layer and function: what of the layer needs the function is at most the function itself."""
    rows: dict[tuple[int, str], int] = {}
    entries: list[tuple[int, int, float]] = []
    for place, c in enumerate(candidates):
        for name in c.size.shared:
            key = (layers[c.layer], name)
            if key not in rows:
                rows[key] = len(rows)
                entries.append((rows[key], places[name], -1.0))
            entries.append((rows[key], place, 1.0))
    if not rows:
        return None
    at, column, value = zip(*entries, strict=True)
    return coo_array((value, (at, column)), shape=(len(rows), len(candidates) + len(places))).tocsr()
