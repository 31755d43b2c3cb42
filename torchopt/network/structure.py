"""Arguments and results of any structure as flat rows of values with names, and back: lists, tuples, dicts, dataclasses, ModelOutput.

torch's pytree takes an unknown dataclass for one value; here its fields are looked into without registering the user's class anywhere.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value with its name, such as `state_0` or `batch_ids`.

    Example:
        >>> list(leaves({"x": 1, "state": [2, (3,)]}))
        [('x', 1), ('state_0', 2), ('state_1_0', 3)]
    """
    children = _children(value)
    if children is None:
        yield name, value
        return
    for key, child in children:
        yield from leaves(child, f"{name}_{key}" if name else str(key))


def rebuilt(value: Any, row: Iterator[Any]) -> Any:
    """Return the same structure with its values taken from `row`, in the order of `leaves`.

    Example:
        >>> rebuilt({"x": 1, "state": [2, (3,)]}, iter("abc"))
        {'x': 'a', 'state': ['b', ('c',)]}
    """
    children = _children(value)
    if children is None:
        return next(row)
    made = {key: rebuilt(child, row) for key, child in children}
    if isinstance(value, Mapping):
        return type(value)(**made) if dataclasses.is_dataclass(value) else type(value)(made)  # type: ignore[call-arg]
    if isinstance(value, tuple):
        return type(value)(*made.values()) if hasattr(value, "_fields") else tuple(made.values())
    if isinstance(value, list):
        return list(made.values())
    other = copy.copy(value)
    for key, child in made.items():
        object.__setattr__(other, key, child)  # of frozen ones, too
    return other


def containers(value: Any) -> Any:
    """Return the structure with dataclasses as dicts, which torch's pytree looks into.

    Example:
        >>> @dataclasses.dataclass
        ... class Pair:
        ...     a: int
        ...     b: int
        >>> containers([Pair(1, 2)])
        [{'a': 1, 'b': 2}]
    """
    children = _children(value)
    if children is None or not _holds_dataclass(value):
        return value
    made = {key: containers(child) for key, child in children}
    if isinstance(value, Mapping) or _is_dataclass(value):
        return made
    if isinstance(value, tuple):
        return type(value)(*made.values()) if hasattr(value, "_fields") else tuple(made.values())
    return list(made.values())


def nested(value: Any) -> bool:
    """True for a structure, false for a value."""
    return _children(value) is not None


def _holds_dataclass(value: Any) -> bool:
    return _is_dataclass(value) or any(_holds_dataclass(child) for _, child in _children(value) or ())


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping)


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple) and type(value).__name__ != "Size":
        return list(enumerate(value))
    if _is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None
