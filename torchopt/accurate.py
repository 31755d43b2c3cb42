"""`one_shot(..., evaluate=…)`: integers only as far as the user's own score allows.

The layers with `fallback="auto"` are ordered by what their rounding does to the outputs (`quantize/harm.py`). The most harmful are left
float, 1, 2, 4, … of them, until the score is within `max_drop` of the float model's; bisection then finds the fewest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import nn

from torchopt.errors import ConfigError, DataError, TargetError
from torchopt.rules import Rule, assign

Evaluate = Callable[[nn.Module], float]


def accurate(
    model: nn.Module,
    rules: Sequence[Rule],
    compress: Callable[[Sequence[Rule]], nn.Module],
    harms: Callable[[], dict[str, float]],
    evaluate: Evaluate,
    max_drop: float,
) -> nn.Module:
    """Return the model compressed with the fewest layers left float whose score is high enough.

    Args:
        model: the float network; it is not touched.
        rules: what is asked for; layers of rules with `Quantize(fallback="auto")` may stay float.
        compress: makes the finished model from rules.
        harms: measures how much each layer's rounding moves the outputs, by module path; called only where it is needed.
        evaluate: a score of a model, higher is better.
        max_drop: how far below the float model's score is allowed, in the units of `evaluate`.

    Raises:
        ConfigError: no rule has fallback="auto", or `max_drop` is negative.
        DataError: `evaluate` returns no finite number.
        TargetError: the score is too low with every such layer in float.
    """
    asked = [a.weight for a in assign(model, rules) if a.rule.quantize is not None and a.rule.quantize.fallback == "auto"]
    if not asked:
        raise ConfigError("one_shot: evaluate= decides which layers stay float; give their rules Quantize(fallback='auto')")
    if not max_drop >= 0:
        raise ConfigError(f"one_shot: max_drop={max_drop}; 0 or more is needed, in the units of evaluate")
    goal = _score(evaluate, copy.deepcopy(model).eval()) - max_drop
    tried: dict[int, tuple[nn.Module, float]] = {}

    def reaches(count: int) -> bool:
        final = compress(_float_first(model, rules, names[:count]))
        tried[count] = (final, _score(evaluate, final.eval()))
        return tried[count][1] >= goal

    names: list[str] = []
    if reaches(0):
        return tried[0][0]
    found = harms()
    names = sorted((w.name for w in asked), key=lambda name: -_harm(found, name))
    low, high = 0, 1
    while not reaches(high):
        if high == len(names):
            raise TargetError(
                f"one_shot: with all {high} layers float the score is {tried[high][1]:.6g}; {goal:.6g} is needed: masks or tables cost it"
            )
        low, high = high, min(2 * high, len(names))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return tried[high][0]


def _harm(found: dict[str, float], weight: str) -> float:
    """A weight's harm: its module's, or the sum of those that a module was opened into."""
    path = weight.rpartition(".")[0]
    return sum(harm for other, harm in found.items() if other == path or other.startswith(f"{path}."))


def _float_first(model: nn.Module, rules: Sequence[Rule], names: Sequence[str]) -> list[Rule]:
    """The rules, preceded by one for each named weight that keeps its masks and tables and has no grid."""
    assigned = assign(model, rules)
    exact = [Rule(a.weight.name, prune=a.rule.prune, cluster=a.rule.cluster) for a in assigned if a.weight.name in names]
    used = {id(a.rule) for a in assigned if a.weight.name not in names}
    return [*exact, *(rule for rule in rules if id(rule) in used)]


def _score(evaluate: Evaluate, model: nn.Module) -> float:
    score = float(evaluate(model))
    if not -float("inf") < score < float("inf"):
        raise DataError(f"one_shot: evaluate returned {score}; a finite number is needed, higher for better")
    return score
