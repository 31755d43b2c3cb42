"""Towards a goal: solve with the model of costs, make and measure what came out, correct the model, until no smaller point is left.

For a drop of the score, the unknown is how much noise the score bears. It lies between that of a point that passed and that of one that
failed; each point that is measured halves what is between, and tells how layers act on one another. For bytes or time, the solver has
the limit itself, and what is corrected is how true its costs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torchopt.errors import TargetError
from torchopt.search.choices import Option
from torchopt.search.composed import Composer, Point
from torchopt.search.predict import Model

CLOSE = 0.04  # of the noise, or less than this in bytes: two points are next to each other
ALIKE = 0.004
SOLVED = 0.6  # of the points are looked for by the solver, the rest near the best of them
FIRST_STEP = 0.03  # of the bytes
WIDER = 1.3  # noise is not all of a score: a point with a little more may pass where another failed
STEEP = (0.3, 0.7)  # where between a pass and a failure the next point may lie
WITHIN = 0.995  # of a limit on bytes: near enough


@dataclass(kw_only=True)
class Search:
    """One search: its composer, its model of costs, and the points so far.

    Attributes:
        composer: makes points.
        model: of costs, as far as it is corrected.
        reference: the float network's score.
        minimize: what the solver makes small: "bytes" or "latency".
        most: points to measure, at most.
        said: told after each point.
        points: measured so far.
    """

    composer: Composer
    model: Model
    reference: float
    minimize: str
    most: int
    said: Callable[[Point], object] = lambda point: None
    points: list[Point] = field(default_factory=list)

    def measure(self, chosen: dict[str, Option]) -> Point:
        """Make a point, and learn from it."""
        expected = (self.model.bytes(chosen), self.model.latency(chosen)) if self.points else (None, None)
        point = self.composer.point(chosen, expected)
        self.points.append(point)
        self.model = self.model.learned(self.points, trains=self.composer.train is not None)
        self.said(point)
        return point

    def drop(self, point: Point) -> float:
        """How far a point's score is below the float network's."""
        return self.reference - point.score

    def tried(self, chosen: dict[str, Option]) -> bool:
        """Whether a choice has been measured."""
        return any(point.chosen == chosen for point in self.points)

    def meets(self, point: Point, allowed: float) -> bool:
        """Whether a point drops at most so much; 1 − 0.99 is 0.01, whatever binary fractions say."""
        return self.drop(point) <= allowed + 1e-9 * max(1.0, abs(self.reference))

    def noise(self, point: Point) -> float:
        """What orders points: measured noise, or the solver's where training changes what is measured."""
        return point.loss if self.composer.train is None else self.model.loss(point.chosen)


def to_drop(search: Search, allowed: float) -> Point:
    """Return the smallest point whose score is at most `allowed` below float's.

    Raises:
        TargetError: even 8 bits everywhere, or what is nearest to float, drops more.
    """
    first = search.measure(search.model.largest())
    if not search.meets(first, allowed):
        first = _nearer(search, first, allowed)
    smallest = (
        search.model.smallest() if search.minimize == "bytes" else search.model.best(search.minimize) or search.model.smallest()
    )
    if search.tried(smallest) or search.meets(search.measure(smallest), allowed):
        return _best(search, allowed)
    most = 3 + math.ceil(SOLVED * (search.most - 3))
    low, high = 0.0, math.inf  # budgets tried since the best point: none smaller came of the one, a failure of the other
    while len(search.points) < most:
        start = _best(search, allowed)
        worse = [p for p in search.points if not search.meets(p, allowed) and _cost(search, p) < _cost(search, start)]
        if not worse:
            break
        end = max(worse, key=lambda p: _cost(search, p))  # the nearest failure on the way down
        lower = max(search.noise(start), low, 1e-12)
        upper = min(max(search.noise(end), search.noise(start) * WIDER), high)
        if upper <= lower * (1 + CLOSE) or _cost(search, end) > (1 - ALIKE) * _cost(search, start):
            break
        budget = _between(lower, upper, search.drop(start), search.drop(end), allowed)
        chosen = search.model.best(search.minimize, loss=budget)
        if chosen is None:
            low = budget
            continue
        point = next((p for p in search.points if p.chosen == chosen), None) or search.measure(chosen)
        if not search.meets(point, allowed):
            high = budget
        elif _best(search, allowed) is point and point is not start:
            low, high = 0.0, math.inf
        else:
            low = budget
    return _descended(search, allowed)


def _descended(search: Search, allowed: float) -> Point:
    """From the best point down by few layers at a time, those first that save most bytes for their noise; half as far after a failure.

    Scores jump between choices that have little in common; between neighbours they jump less.
    """
    step = FIRST_STEP
    while len(search.points) < search.most and step > ALIKE and search.minimize == "bytes":
        start = _best(search, allowed)
        chosen = search.model.smaller(start.chosen, step * start.bytes)
        if chosen is None:
            break
        point = next((p for p in search.points if p.chosen == chosen), None) or search.measure(chosen)
        if not search.meets(point, allowed) or point.bytes >= start.bytes:
            step /= 2
    return _best(search, allowed)


def _between(lower: float, upper: float, passed: float, failed: float, allowed: float) -> float:
    """A budget of noise between two: nearer to the one whose drop is nearer to what is allowed."""
    share = (allowed - passed) / (failed - passed) if failed > passed else 0.5
    share = min(STEEP[1], max(STEEP[0], math.sqrt(max(0.0, share))))
    return math.exp(math.log(lower) + share * (math.log(upper) - math.log(lower)))


def _nearer(search: Search, first: Point, allowed: float) -> Point:
    """The network with the layers float that harm most, more of them each time; where 8 bits everywhere drop too much.

    Raises:
        TargetError: nothing meets the drop.
    """
    layers = sorted(first.chosen, key=lambda layer: -search.model.alone(layer, first.chosen[layer]))
    can = [layer for layer in layers if search.model.has(layer, Option(bits=None))]
    count = 1
    while can and len(search.points) < search.most:
        floats = set(can[: min(count, len(can))])
        point = search.measure({k: Option(bits=None) if k in floats else o for k, o in first.chosen.items()})
        if search.meets(point, allowed):
            search.model = search.model.floating(floats)
            return point
        if count >= len(can):
            break
        count *= 2
    best = min(search.points, key=search.drop)
    raise TargetError(
        f"search: max_drop={allowed:g} cannot be met: the nearest point drops {search.drop(best):.6g} with {best.bytes:,} bytes, by "
        f"{_told(best)}; allow that much, or give more batches"
    )


def to_bytes(search: Search, limit: float) -> Point:
    """Return the point of the least noise whose file has at most `limit` bytes.

    Raises:
        TargetError: even the smallest file is larger.
    """
    smallest = search.measure(search.model.smallest())
    if smallest.bytes > limit:
        raise TargetError(
            f"search: max_bytes={limit:,.0f} cannot be met: the smallest file has {smallest.bytes:,} bytes (score {smallest.score:.6g}), "
            f"by {_told(smallest)}; allow that much, or give sparser choices="
        )
    goal = limit
    while len(search.points) < search.most:
        chosen = search.model.best("loss", bytes=goal)
        if chosen is None or search.tried(chosen):
            break
        point = search.measure(chosen)
        if point.bytes > limit:
            goal -= max(point.bytes - limit, 1)
        elif point.bytes >= WITHIN * limit:
            break
    fitting = [p for p in search.points if p.bytes <= limit]
    return max(fitting, key=lambda p: (p.score, -p.loss))


def to_latency(search: Search, limit: float) -> Point:
    """Return the point of the least noise whose file takes at most `limit` milliseconds.

    Raises:
        TargetError: none does.
    """
    search.measure(search.model.largest())
    goal = limit
    while len(search.points) < search.most:
        chosen = search.model.best("loss", latency=goal)
        if chosen is None or search.tried(chosen):
            break
        time = search.measure(chosen).latency_ms or math.inf
        if time <= limit:
            break
        goal *= 0.95 * limit / time if time > limit * 1.05 else 0.97
    fitting = [p for p in search.points if (p.latency_ms or math.inf) <= limit]
    if fitting:
        return max(fitting, key=lambda p: (p.score, -p.loss))
    best = min(search.points, key=lambda p: p.latency_ms or math.inf)
    raise TargetError(
        f"search: max_latency_ms={limit:g} cannot be met by rounding: the nearest point takes {best.latency_ms:.4g} ms, by {_told(best)}; "
        "allow that much, or remove channels first, with torchopt.shrink(model, example_inputs, max_latency_ms=…)"
    )


def _cost(search: Search, point: Point) -> float:
    """What the search makes small."""
    return point.bytes if search.minimize == "bytes" else point.latency_ms or math.inf


def _best(search: Search, allowed: float) -> Point:
    """The best point that passed."""
    passed = [p for p in search.points if search.meets(p, allowed)]
    return min(passed, key=lambda p: (_cost(search, p), p.bytes, -p.score))


def _told(point: Point) -> str:
    """A point's rules in a few words."""
    counts: dict[str, int] = {}
    for option in point.chosen.values():
        counts[str(option)] = counts.get(str(option), 0) + 1
    return "; ".join(f"{count} layers {option}" for option, count in sorted(counts.items(), key=lambda pair: -pair[1])[:4])
