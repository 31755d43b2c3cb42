"""`one_shot(..., evaluate=…)`: integers only as far as the user's own score allows.

The layers with `fallback="auto"` are ordered by what their rounding does to the outputs (`quantize/calibration/sensitivity.py`).
The most harmful are left float, 1, 2, 4, … of them, until the score is within `max_drop` of the float model's.
Bisection then finds the fewest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from torchopt import quantize as quantization
from torchopt.compress.verbs import finalize
from torchopt.errors import ConfigError, DataError, TargetError
from torchopt.network.batches import Batch, pieces
from torchopt.process.ordinary import alone
from torchopt.rules import Rule, assign, without_grids

SAMPLES = 32  # run once for each layer, to see what its rounding does
Evaluate = Callable[[nn.Module], float]


def accurate(
    model: nn.Module,
    rules: Sequence[Rule],
    ready: Callable[[Sequence[Rule]], nn.Module],
    batches: Sequence[Batch],
    evaluate: Evaluate,
    max_drop: float,
) -> nn.Module:
    """Return the model compressed with the fewest layers left float whose score is high enough.

    Args:
        model: the float network; it is not touched.
        rules: what is asked for; layers of rules with `Quantize(fallback="auto")` may stay float.
        ready: makes the prepared and calibrated model of rules.
        batches: data that shows what each layer's rounding does to the outputs; some samples of the first are looked at.
        evaluate: a score of a model, higher is better.
        max_drop: how far below the float model's score is allowed, in the units of `evaluate`.

    Raises:
        ConfigError: no rule has fallback="auto", `max_drop` is negative, or there is no data where some is needed.
        DataError: `evaluate` returns no finite number.
        TargetError: the score is too low with every such layer in float.
    """
    assigned = assign(model, rules)
    asked = [a.weight.name for a in assigned if a.rule.quantize is not None and a.rule.quantize.fallback == "auto"]
    if not asked:
        raise ConfigError("one_shot: evaluate= decides which layers stay float; give their rules Quantize(fallback='auto')")
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not max_drop >= 0:
        raise ConfigError(f"one_shot: max_drop={max_drop!r}; 0 or more is needed, a number in the units of evaluate")
    goal = _score(evaluate, copy.deepcopy(model).eval()) - max_drop
    whole = ready(rules)
    final = finalize(whole, unfinished=True)
    if _score(evaluate, final.eval()) >= goal:
        return final
    names = _by_harm(whole, asked, batches)
    tried: dict[int, nn.Module] = {}

    def score(count: int) -> float:
        tried[count] = finalize(ready(without_grids(rules, assigned, names[:count])), unfinished=True)
        return _score(evaluate, tried[count].eval())

    low, high = 0, 1
    while (reached := score(high)) < goal:
        if high == len(names):
            raise TargetError(
                f"one_shot: with all {high} layers float the score is {reached:.6g}; {goal:.6g} is needed: masks or tables cost it"
            )
        low, high = high, min(2 * high, len(names))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if score(middle) >= goal else (middle, high)
    return tried[high]


@alone()
def _by_harm(whole: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> list[str]:
    """The weights, those first whose layers' rounding moves the outputs most.

    Raises:
        ConfigError: there is no data to see that by.
    """
    if not batches:
        raise ConfigError("one_shot: evaluate= leaves float what harms the outputs most, which data shows; give batches")
    found = quantization.harms(whole, [next(pieces(batches[0], SAMPLES))])
    return sorted(names, key=lambda name: -_harm(found, name))


def _harm(found: dict[str, float], weight: str) -> float:
    """A weight's harm: its module's, or the sum of those that a module was opened into."""
    path = weight.rpartition(".")[0]
    return sum(harm for other, harm in found.items() if other == path or other.startswith(f"{path}."))


def _score(evaluate: Evaluate, model: nn.Module) -> float:
    given: Any = evaluate(model)
    try:
        score = float(given)
    except (TypeError, ValueError) as error:
        what = "None (does it return its score?)" if given is None else f"{type(given).__name__} {str(given)[:40]!r}"
        raise DataError(f"one_shot: evaluate returned {what}; a finite number is needed, higher for better") from error
    if not -float("inf") < score < float("inf"):
        raise DataError(f"one_shot: evaluate returned {score}; a finite number is needed, higher for better")
    return score
