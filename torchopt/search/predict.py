"""What a choice will cost, from what single layers cost, corrected by what whole choices were measured to cost.

    noise  =  n0 + Σ f_layer · noise of the layer alone        f ≥ 0, 1 until points say otherwise
    bytes  =  b0 + Σ bytes of the tensors + functions          b0: graph and biases, from the choices most like it
    time   =  t0 · Σ time of the layers

Layers act on one another: what one rounds, the next may repair or amplify. The factors are fitted to the points measured so far by least
squares of logarithms, drawn to 1 so that few points move them little: an explosion of noise counts as much as a silence.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from torchopt.search.choices import Option
from torchopt.search.composed import Point
from torchopt.search.knapsack import Candidate, choose
from torchopt.search.layers.sizes import Size, total
from torchopt.search.layers.table import Sensitivity

RUINED = 0.3  # noise over signal from which on outputs saturate: what is added changes little, and tells nothing of layers
DRAWN = 0.3  # how much the logarithm of a factor is drawn to 0, against one point's error


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model of costs: candidates as measured alone, and what corrects them."""

    candidates: list[Candidate]
    factors: Mapping[str, float]
    noise: float = 0.0
    known: Sequence[tuple[Mapping[str, Option], float]] = ()  # choices, and what their files had beside the tensors
    pace: float = 1.0

    @staticmethod
    def of(found: Sensitivity) -> Model:
        """Before any point is measured."""
        candidates = [
            Candidate(layer=row.layer, option=row.option, loss=row.loss, size=size, latency=row.latency_ms or 0.0)
            for rows in found.layers().values()
            for row in rows
            for size in row.sizes
        ]
        return Model(candidates=candidates, factors={})

    def learned(self, points: Sequence[Point], *, trains: bool = False) -> Model:
        """Corrected by what was measured; noise only where nothing is trained, which takes most of it away again."""
        layers = list(dict.fromkeys(c.layer for c in self.candidates))
        alone = {(c.layer, c.option): c.loss for c in self.candidates}
        useful = [] if trains else [p for p in points if 0 < p.loss < RUINED]
        shares = np.array([[alone[layer, p.chosen[layer]] for layer in layers] for p in useful]).reshape(-1, len(layers))
        noise, factors = _fitted(shares, np.array([p.loss for p in useful]))
        last = points[-1]
        made = replace(self, factors=dict(zip(layers, factors.tolist(), strict=True)), noise=noise)
        spent = sum({(c.layer, c.option): c.latency for c in self.candidates}[layer, last.chosen[layer]] for layer in layers)
        pace = last.latency_ms / spent if last.latency_ms and spent else self.pace
        known = [(point.chosen, float(point.bytes - made._tensors(point.chosen))) for point in points]
        return replace(made, known=known, pace=pace)

    def best(
        self, minimize: str, *, loss: float = math.inf, bytes: float = math.inf, latency: float = math.inf
    ) -> dict[str, Option] | None:
        """The best choice under limits on the whole; None where there is none."""
        given = [replace(c, loss=c.loss * self.factors.get(c.layer, 1.0)) for c in self.candidates]
        limits = {"loss": loss - self.noise, "bytes": bytes - self._overhead(None), "latency": latency / self.pace}
        if min(limits["loss"], limits["bytes"]) < 0:
            return None
        found = choose(given, minimize=minimize, **limits)
        return None if found is None else {layer: c.option for layer, c in found.items()}

    def loss(self, chosen: Mapping[str, Option]) -> float:
        """The noise to expect."""
        alone = {(c.layer, c.option): c.loss for c in self.candidates}
        return self.noise + sum(self.factors.get(layer, 1.0) * alone[layer, option] for layer, option in chosen.items())

    def bytes(self, chosen: Mapping[str, Option]) -> float:
        """The size of the file to expect."""
        return self._overhead(chosen) + self._tensors(chosen)

    def latency(self, chosen: Mapping[str, Option]) -> float:
        """The milliseconds to expect."""
        alone = {(c.layer, c.option): c.latency for c in self.candidates}
        return self.pace * sum(alone[layer, option] for layer, option in chosen.items())

    def alone(self, layer: str, option: Option) -> float:
        """The noise of one layer under one option, by itself."""
        return {(c.layer, c.option): c.loss for c in self.candidates}[layer, option]

    def has(self, layer: str, option: Option) -> bool:
        """Whether a layer may have an option."""
        return any((c.layer, c.option) == (layer, option) for c in self.candidates)

    def floating(self, layers: Collection[str]) -> Model:
        """The same with some layers float in every choice."""
        return replace(self, candidates=[c for c in self.candidates if c.layer not in layers or c.option.bits is None])

    def smallest(self) -> dict[str, Option]:
        """The choice of the fewest bytes."""
        found = self.best("bytes")
        assert found is not None
        return found

    def largest(self) -> dict[str, Option]:
        """Every layer with its most bits, none float."""
        first: dict[str, Option] = {}
        for c in self.candidates:
            if c.layer not in first or first[c.layer].bits is None:
                first[c.layer] = c.option
        return first

    def smaller(self, chosen: Mapping[str, Option], bytes: float) -> dict[str, Option] | None:
        """A choice that takes about so many bytes less, by the layers that save most for their noise; None where no layer can.

        Args:
            chosen: to start from.
            bytes: to save, at least, where that can be.
        """
        own: dict[tuple[str, Option], float] = {}
        for c in self.candidates:
            own[c.layer, c.option] = min(float(c.size.own), own.get((c.layer, c.option), math.inf))
        noise = {(c.layer, c.option): self.factors.get(c.layer, 1.0) * c.loss for c in self.candidates}
        moves = []
        for layer, option in own:
            now = (layer, chosen[layer])
            saved = own[now] - own[layer, option]
            if saved > 0:
                moves.append(((noise[layer, option] - noise[now]) / saved, layer, option, saved))
        made, left = dict(chosen), bytes
        for _, layer, option, saved in sorted(moves, key=lambda move: move[0]):
            if made[layer] == chosen[layer] and left > 0:
                made[layer], left = option, left - saved
        return made if moves else None

    def _overhead(self, chosen: Mapping[str, Option] | None) -> float:
        """Bytes beside the tensors: as in the choices measured, those most that have more in common with this one."""
        if not self.known:
            return 0.0
        if chosen is None:
            return self.known[-1][1]
        alike = [sum(then[k] == o for k, o in chosen.items()) / len(chosen) for then, _ in self.known]
        weight = [(0.05 + a) ** 4 for a in alike]
        return sum(w * size for w, (_, size) in zip(weight, self.known, strict=True)) / sum(weight)

    def _tensors(self, chosen: Mapping[str, Option]) -> int:
        """The least bytes of the tensors of a choice, functions included."""
        given = [c for c in self.candidates if chosen[c.layer] == c.option]
        found = choose(given, minimize="bytes")
        sizes: list[Size] = [] if found is None else [c.size for c in found.values()]
        return total(sizes)


def _fitted(shares: np.ndarray, measured: np.ndarray) -> tuple[float, np.ndarray]:
    """The noise that no layer brings, and the factor of each layer, from the points' noises."""
    layers = shares.shape[1]
    if not len(measured):
        return 0.0, np.ones(layers)
    start = max(float((measured - shares.sum(1)).min()), 1e-3 * float(measured.min()))

    def errors(x: np.ndarray) -> np.ndarray:
        told = start * np.exp(x[0]) + shares @ np.exp(x[1:])
        return np.concatenate([np.log(told / measured), DRAWN * x])

    x = least_squares(errors, np.zeros(1 + layers)).x
    return float(start * np.exp(x[0])), np.exp(x[1:])
