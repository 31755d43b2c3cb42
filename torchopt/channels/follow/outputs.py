"""The tensors that a network returns, in whatever it returns them: tuples, dicts, dataclasses, objects of its own.

A tensor that is not seen here would neither keep its width nor be compared: a network whose outputs are wrapped in an unknown class
would lose them without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return all tensors in a value, in order.

    Example:
        >>> class Answer:
        ...     def __init__(self):
        ...         self.logits, self.name = torch.zeros(2), "a"
        >>> [t.shape for t in tensors_of({"x": [Answer()]})]
        [torch.Size([2])]
    """
    found: list[torch.Tensor] = []
    _collect(value, found, set())
    return found


def _collect(value: Any, found: list[torch.Tensor], known: set[int]) -> None:
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif id(leaf) not in known and not isinstance(leaf, type | torch.nn.Module):
            known.add(id(leaf))
            parts = leaf.values() if isinstance(leaf, Mapping) else _fields(leaf)
            for part in parts:
                _collect(part, found, known)


def _fields(value: Any) -> list[Any]:
    """What an object holds; the parameters of a distribution, the tensors of a structure of one's own."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*vars(value).values()] if hasattr(value, "__dict__") else [getattr(value, s) for s in slots if hasattr(value, s)]
