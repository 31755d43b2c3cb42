"""Dropout while a prepared network trains: as much as in the float one, and none while the two are compared.

Code may ask `self.training` for the rate instead of for the mode, as transformers' attention does:

    F.dropout(weights, p=0.1 if self.training else 0.0, training=self.training)

A graph traced in evaluation holds the rate 0 there. So the float network runs once in training mode, the rates that it really uses are
noted in order, and dropouts of the prepared network that hold another get theirs. Where their number differs, rates cannot be told
apart, and the user is warned. Two networks with dropout are compared without it: they need not draw their numbers in one order.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from torchopt.quantize.graph.dropout import MODULES

ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}  # the place of the rate among their arguments


class NoDropout(TorchFunctionMode):
    """Dropout functions give back what they get, and the rates that they were asked for are noted, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or let it pass."""
        kwargs = dict(kwargs or {})
        if func in MODULES:
            rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            on = kwargs.get("training", args[2] if len(args) > 2 else True)
            if on:
                self.rates.append(float(rate))
                return args[0] if args else kwargs["input"]
        place = ATTENTION.get(func)
        if place is not None:  # with dropout inside, which no function of these shows
            rate = kwargs.pop("dropout_p", args[place] if len(args) > place else 0.0)
            if rate and kwargs.get("training", True):
                self.rates.append(float(rate))
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            elif func is F.multi_head_attention_forward:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Run without dropout, whatever the mode."""
    with NoDropout():
        yield


class Noted:
    """What both networks of a comparison in training mode run in: without dropout, and what they asked for is noted.

    Attributes:
        asked: by network, the rates of its last call in order, and the dropout modules that asked for them; None where a function did.
    """

    def __init__(self) -> None:
        self.asked: dict[nn.Module, tuple[list[float], list[nn.Module | None]]] = {}

    @contextlib.contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Run `model` so."""
        mode, latest = NoDropout(), list[tuple[nn.Module, int]]()

        def enter(module: nn.Module, _: Any) -> None:
            latest.append((module, len(mode.rates)))

        handles = [m.register_forward_pre_hook(enter) for m in model.modules() if isinstance(m, _DropoutNd)]
        try:
            with mode:
                yield
        finally:
            for handle in handles:
                handle.remove()
        asking = {number: module for module, number in latest}  # the last to enter before a rate was noted is who asked
        self.asked[model] = mode.rates, [asking.get(number) for number in range(len(mode.rates))]


def restore_rates(origin: nn.Module, network: nn.Module, noted: Noted) -> None:
    """Give the dropouts of a traced network, in place, the rates that the float network uses in training mode.

    Args:
        origin: the float network.
        network: the traced one.
        noted: what both have run in.
    """
    if not (origin in noted.asked and network in noted.asked):  # what does not run in training mode is said by the comparison
        return
    (wanted, _), (given, owners) = noted.asked[origin], noted.asked[network]
    if [rate for rate in wanted if rate] == [rate for rate in given if rate]:
        return
    if len(wanted) != len(given):
        warnings.warn(
            f"quantize: {type(origin).__name__} drops values at {len(wanted)} places while it trains, and its graph at {len(given)}; "
            "the others train without dropout; call nn.Dropout modules, which keep theirs",
            stacklevel=2,
        )
        return
    for rate, module in zip(wanted, owners, strict=True):
        if isinstance(module, _DropoutNd):
            module.p = rate
