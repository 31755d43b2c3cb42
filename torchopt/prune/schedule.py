"""When masks change, and how sparse they are then: pure functions of the optimizer step.

    s(t) = final + (initial - final) · (1 - p)^power,    p = clip((t - begin) / (end - begin), 0, 1)

is the polynomial decay of Zhu and Gupta, "To prune, or not to prune" (2017, arXiv 1710.01878), digit for digit as TensorFlow
Model Optimization computes it. A schedule fires each `frequency` steps from `begin_step` on. Two firings are added to TFMOT's, so
that the final sparsity is always reached: one at `end_step`, whatever the frequency, and one at step 1 where `begin_step` is 0,
because training never sees step 0. Steps are optimizer steps: shared modules, several forward passes and gradient accumulation do
not count twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torchopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConstantSparsity:
    """One sparsity from `begin_step` on; the mask is chosen anew each `frequency` steps.

    Attributes:
        target_sparsity: fraction of zeros, in [0, 1).
        begin_step: first optimizer step that prunes; 0 and 1 both mean the first.
        end_step: last step that prunes, -1 for no end.
        frequency: steps between two choices of the mask.

    Raises:
        ConfigError: a field is out of its range.

    Example:
        >>> half = ConstantSparsity(target_sparsity=0.5, begin_step=10, frequency=5)
        >>> [step for step in range(22) if half.fires(step)]
        [10, 15, 20]
    """

    kind: ClassVar[str] = "constant"

    target_sparsity: float
    begin_step: int = 0
    end_step: int = -1
    frequency: int = 100

    def __post_init__(self) -> None:
        _check_sparsity(self, "target_sparsity")
        _check_span(self, endless=True)

    @property
    def final(self) -> float:
        """The sparsity that the schedule ends at."""
        return self.target_sparsity

    @property
    def done_step(self) -> int:
        """The optimizer step that reaches the final sparsity."""
        return max(1, self.begin_step)

    def sparsity_at(self, step: int) -> float:
        """Return the fraction of zeros asked for at `step`."""
        return self.target_sparsity

    def fires(self, step: int) -> bool:
        """True where masks are chosen anew after optimizer step `step`."""
        return _fires(step, self.begin_step, self.end_step, self.frequency)


@dataclass(frozen=True, kw_only=True)
class _Decay(ABC):
    """What the schedules from one sparsity to another share; how much is left on the way is each one's own."""

    final_sparsity: float
    end_step: int
    initial_sparsity: float = 0.0
    begin_step: int = 0
    frequency: int = 100

    def __post_init__(self) -> None:
        _check_sparsity(self, "initial_sparsity")
        _check_sparsity(self, "final_sparsity")
        _check_span(self, endless=False)

    @property
    def final(self) -> float:
        """The sparsity that the schedule ends at."""
        return self.final_sparsity

    @property
    def done_step(self) -> int:
        """The optimizer step that reaches the final sparsity."""
        return max(1, self.end_step)

    def sparsity_at(self, step: int) -> float:
        """Return the fraction of zeros asked for at `step`."""
        left = self._left(_progress(step, self.begin_step, self.end_step))
        return float(self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left)

    def fires(self, step: int) -> bool:
        """True where masks are chosen anew after optimizer step `step`."""
        return _fires(step, self.begin_step, self.end_step, self.frequency)

    @abstractmethod
    def _left(self, passed: float) -> float:
        """How much of the way is left, 1 to 0, when `passed` of the steps are."""


@dataclass(frozen=True, kw_only=True)
class PolynomialDecay(_Decay):
    """From `initial_sparsity` to `final_sparsity`, fast at first and slowly at the end.

    Attributes:
        final_sparsity: fraction of zeros at `end_step`, in [0, 1).
        end_step: last step that prunes.
        initial_sparsity: fraction of zeros at `begin_step`, in [0, 1).
        begin_step: first optimizer step that prunes; 0 and 1 both mean the first.
        power: the exponent; 3 is the paper's.
        frequency: steps between two choices of the mask; `end_step` is always one.

    Raises:
        ConfigError: a field is out of its range.

    Example:
        >>> decay = PolynomialDecay(initial_sparsity=0.2, final_sparsity=0.8, begin_step=100, end_step=110)
        >>> [round(decay.sparsity_at(step), 6) for step in (100, 102, 105, 110)]
        [0.2, 0.4928, 0.725, 0.8]
    """

    kind: ClassVar[str] = "polynomial"

    power: float = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not 0 < self.power < math.inf:
            raise ConfigError(f"PolynomialDecay.power: got {self.power!r}; a number above 0 is needed, 3 is usual")

    def _left(self, passed: float) -> float:
        return float((1.0 - passed) ** self.power)


@dataclass(frozen=True, kw_only=True)
class CosineDecay(_Decay):
    """From `initial_sparsity` to `final_sparsity` along half a cosine: slow, fast, slow.

    Attributes:
        final_sparsity: fraction of zeros at `end_step`, in [0, 1).
        end_step: last step that prunes.
        initial_sparsity: fraction of zeros at `begin_step`, in [0, 1).
        begin_step: first optimizer step that prunes; 0 and 1 both mean the first.
        frequency: steps between two choices of the mask; `end_step` is always one.

    Raises:
        ConfigError: a field is out of its range.

    Example:
        >>> decay = CosineDecay(final_sparsity=0.8, end_step=100)
        >>> [round(decay.sparsity_at(step), 6) for step in (0, 25, 50, 100)]
        [0.0, 0.117157, 0.4, 0.8]
    """

    kind: ClassVar[str] = "cosine"

    def _left(self, passed: float) -> float:
        return (1.0 + math.cos(math.pi * passed)) / 2.0


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """A staircase: `sparsities[i]` from optimizer step `milestones[i]` on, nothing pruned before the first.

    Attributes:
        milestones: optimizer steps, at least 1 and rising.
        sparsities: as many fractions of zeros, each in [0, 1).

    Raises:
        ConfigError: a field is out of its range, or the two differ in length.

    Example:
        >>> stairs = MultiStep(milestones=(10, 20), sparsities=(0.5, 0.8))
        >>> [(step, stairs.sparsity_at(step), stairs.fires(step)) for step in (9, 10, 15, 20)]
        [(9, 0.0, False), (10, 0.5, True), (15, 0.5, False), (20, 0.8, True)]
    """

    kind: ClassVar[str] = "multi_step"

    milestones: Sequence[int]
    sparsities: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("milestones", "sparsities"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or len(value) == 0:
                raise ConfigError(f"MultiStep.{name}: got {value!r}; a list of at least one number is needed")
            object.__setattr__(self, name, tuple(value))
        for value in self.milestones:
            if not _is_int(value) or value < 1:
                raise ConfigError(f"MultiStep.milestones: got {value!r}; whole optimizer steps of at least 1 are needed")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ConfigError(f"MultiStep.milestones: got {list(self.milestones)}; each must be larger than the one before")
        for sparsity in self.sparsities:
            check_sparsity("MultiStep.sparsities", sparsity)
        if len(self.milestones) != len(self.sparsities):
            counts = f"{len(self.milestones)} milestones and {len(self.sparsities)} sparsities"
            raise ConfigError(f"MultiStep: got {counts}; one sparsity a milestone is needed")

    @property
    def end_step(self) -> int:
        """The last milestone."""
        return self.milestones[-1]

    @property
    def final(self) -> float:
        """The sparsity that the schedule ends at."""
        return self.sparsities[-1]

    @property
    def done_step(self) -> int:
        """The optimizer step that reaches the final sparsity."""
        return self.milestones[-1]

    def sparsity_at(self, step: int) -> float:
        """Return the fraction of zeros asked for at `step`."""
        passed = sum(milestone <= step for milestone in self.milestones)
        return float(self.sparsities[passed - 1]) if passed else 0.0

    def fires(self, step: int) -> bool:
        """True where masks are chosen anew after optimizer step `step`."""
        return step in self.milestones


Schedule = ConstantSparsity | PolynomialDecay | CosineDecay | MultiStep


def reached(schedule: Schedule, steps: int) -> float:
    """Return the sparsity that masks have after `steps` optimizer steps: that of the last one at which the schedule fired.

    Example:
        >>> round(reached(PolynomialDecay(final_sparsity=0.8, end_step=100, frequency=10), 45), 4)
        0.6272
        >>> reached(ConstantSparsity(target_sparsity=0.5, begin_step=50), 45)
        0.0
    """
    if steps >= schedule.done_step:
        return schedule.final
    return next((schedule.sparsity_at(step) for step in range(steps, 0, -1) if schedule.fires(step)), 0.0)


def check_sparsity(where: str, value: object) -> None:
    """Refuse a sparsity outside [0, 1).

    Raises:
        ConfigError: `value` is no number, NaN, below 0, or 1 and more.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{where}: got {value!r}; a fraction of zeros in [0, 1) is needed, such as 0.8")


def _check_sparsity(schedule: ConstantSparsity | _Decay, name: str) -> None:
    check_sparsity(f"{type(schedule).__name__}.{name}", getattr(schedule, name))


def _check_span(schedule: ConstantSparsity | _Decay, *, endless: bool) -> None:
    where = type(schedule).__name__
    begin, end, frequency = schedule.begin_step, schedule.end_step, schedule.frequency
    if not _is_int(begin) or begin < 0:
        raise ConfigError(f"{where}.begin_step: got {begin!r}; an optimizer step of at least 0 is needed")
    if not _is_int(end) or (end == -1 and not endless):
        raise ConfigError(f"{where}.end_step: got {end!r}; the optimizer step that reaches the final sparsity is needed")
    if end != -1 and end < begin:
        never = ", or -1 for no end" if endless else ""
        raise ConfigError(f"{where}.end_step: got {end}, before begin_step={begin}; at least {begin} is needed{never}")
    if not _is_int(frequency) or frequency < 1:
        raise ConfigError(f"{where}.frequency: got {frequency!r}; at least 1 step between two mask updates is needed")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _progress(step: int, begin: int, end: int) -> float:
    """Return how far `step` is from `begin` to `end`, in [0, 1]; an empty span is passed at once."""
    if step >= end:
        return 1.0
    return min(max((step - begin) / (end - begin), 0.0), 1.0)


def _fires(step: int, begin: int, end: int, frequency: int) -> bool:
    if begin == 0 and step == 1:  # what was due at step 0, which training never sees
        return True
    if step < begin or (end != -1 and step > end):
        return False
    return (step - begin) % frequency == 0 or step == end
