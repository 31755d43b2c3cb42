"""Copies of a network: one of its own, and one that shares every tensor.

`copy.deepcopy` fails on tensors that autograd computed: weights that a hook computes in each call (`torch.nn.utils.weight_norm`), and
modules that keep an activation of theirs. Such a tensor is a value here, and is copied as one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torchopt.errors import ModelError

DEEP = 4  # how far down in lists and dicts of a module's attributes tensors are looked for


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network.

    Raises:
        ModelError: something that a module holds cannot be copied.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.last = layer(torch.zeros(1, 2))  # copy.deepcopy refuses it
        >>> copied(layer).last.requires_grad
        False
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held(model) if t.requires_grad and not t.is_leaf}
    return _deepcopy(model, memo)


def twin(model: nn.Module) -> nn.Module:
    """Return a network with modules of its own over the same Parameters and buffers: it takes no memory, and follows what trains.

    Raises:
        ModelError: something that a module holds cannot be copied.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> twin(layer).weight is layer.weight
        True
    """
    tensors = (*model.parameters(), *model.buffers(), *held(model))
    return _deepcopy(model, {id(t): t for t in tensors})


class Origin:
    """The float network that a prepared one was made of, for as long as both are one function; copies and files do without it.

    Example:
        >>> copy.deepcopy(Origin(nn.ReLU())).network is None
        True
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network = network

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return Origin()

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()


def held(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that modules keep as plain attributes, also in lists and dicts."""
    for module in model.modules():
        yield from _tensors((v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")), DEEP)


def _tensors(values: Iterable[Any], deep: int) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif deep and isinstance(value, dict):
            yield from _tensors(value.values(), deep - 1)
        elif deep and isinstance(value, list | tuple | set):
            yield from _tensors(value, deep - 1)


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the classes of the attributes raise
        path, name = _culprit(model, memo)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"prepare: {name} of {path or type(model).__name__} cannot be copied ({reason:.120}); remove it from the module before, and "
            "put it back on what is returned"
        ) from error


def _culprit(model: nn.Module, memo: dict[int, Any]) -> tuple[str, str]:
    """The module and the attribute that `copy.deepcopy` fails on."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    return path, f"the attribute {name!r}"
    return "", "a module"
