"""The example inputs at other sizes of their free dimensions: what a file is tried on, and who in a network refuses them.

A network may take some sizes only (multiples of 16, at least a kernel's). Which, torch itself says: sizes are tried in turn, a larger
and a smaller one, and the first that the network runs on are what the file is compared on. Values are the example's, repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchopt.errors import ModelError
from torchopt.export.call import BATCH, Call

STEPS = (1, 2, 3, 4, 8, 16, 32, 64)
LEAVE = "leave it out of dynamic_shapes"


def resized(call: Call, inputs: tuple[Any, ...], more: Mapping[str, int]) -> tuple[Any, ...]:
    """Return the inputs with each named dimension longer by so much, the values repeated from the start."""
    found = []
    for x, free in zip(inputs, call.free, strict=True):
        for at, label in free.items():
            if label in more:
                x = x.index_select(at, torch.arange(x.shape[at] + more[label], device=x.device) % x.shape[at])
        found.append(x)
    return tuple(found)


def at_other_sizes(model: nn.Module, call: Call, inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return the inputs at a larger and at a smaller size of the free dimensions that are no batch, where the network takes such.

    Raises:
        ModelError: it takes no other size.
    """
    sizes = {
        label: x.shape[at] for x, free in zip(inputs, call.free, strict=True) for at, label in free.items() if label != BATCH
    }
    if not sizes:
        return []
    ways = [
        [
            {label: sign * step * (1 + different * (i % 2)) for i, label in enumerate(sizes)}
            for step in STEPS
            for different in (1, 0)
        ]
        for sign in (1, -1)
    ]  # height and width differ, where they may
    ways[0].append(sizes)
    found = []
    for way in ways:
        fitting = (resized(call, inputs, more) for more in way if all(sizes[label] + n > 0 for label, n in more.items()))
        found += [next((other for other in fitting if _refusal(model, other) is None), None)]
    taken = [other for other in found if other is not None]
    if not taken:
        label = next((label for label in sizes if fixed_by(model, call, label)), next(iter(sizes)))
        raise ModelError(
            f"export: {type(model).__name__} takes no other {label!r} than {sizes[label]}{fixed_by(model, call, label)}; {LEAVE}"
        )
    return taken


def fixed_by(model: nn.Module, call: Call, label: str) -> str:
    """Say which layer refuses another size of a dimension, or nothing where none does."""
    for step in (1, 2, 8, 16, 64):
        found = _refusal(model, resized(call, call.inputs, {label: step}))
        if found is None:
            return ""
    assert found is not None
    return f": {found} at another {label!r}"


@torch.no_grad()
def _refusal(model: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """The innermost layer that does not run, with its reason; None where all run."""
    entered: list[str] = []
    names = {id(module): f"{name or type(module).__name__} ({type(module).__name__})" for name, module in model.named_modules()}
    hooks = [m.register_forward_pre_hook(lambda m, _: entered.append(names[id(m)])) for m in model.modules()]
    hooks += [m.register_forward_hook(lambda *_: entered.pop() and None) for m in model.modules()]
    try:
        model(*inputs)
    except Exception as error:  # whatever the model's code raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return f"{entered[-1] if entered else type(model).__name__} refuses it ({reason})"
    finally:
        for hook in hooks:
            hook.remove()
    return None
