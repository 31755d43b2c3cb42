"""Plain data (what YAML or JSON holds) to dataclasses, by their type hints and without mercy.

An unknown key, a missing one, a value of another type, an unknown `kind`: each is an error that names the key path. There is no
registry: among several classes that a field may hold, the one is meant whose class attribute `kind` the mapping names (a class
may also have a field `kind` of its own), or the one with a field `import_` where the mapping has the key `import`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torchopt.errors import ConfigError, TorchoptError, nearest

Path = tuple[str | int, ...]
T = TypeVar("T")


class KeyPathError(ConfigError):
    """A `ConfigError` that knows the key path it is about."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{dotted(path)}: {message}" if path else message)
        self.path = path


def dotted(path: Path) -> str:
    """Write a key path as `stages.0.train`.

    Example:
        >>> dotted(("stages", 0, "train"))
        'stages.0.train'
    """
    return ".".join(map(str, path))


def build(cls: type[T], data: object, path: Path = ()) -> T:
    """Return an instance of the dataclass `cls` from a mapping.

    Args:
        cls: a dataclass; its fields are the keys (a field `import_` is the key `import`).
        data: a mapping of plain values.
        path: where `data` stands in the whole, for messages.

    Raises:
        KeyPathError: a key or value that the class does not take.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Size:
        ...     width: int
        ...     unit: str = "mm"
        >>> build(Size, {"width": 3})
        Size(width=3, unit='mm')
        >>> build(Size, {"widht": 3})
        Traceback (most recent call last):
        torchopt.io.schema.KeyPathError: widht: unknown key; did you mean 'width'?
    """
    if not isinstance(data, Mapping):
        raise KeyPathError(path, f"got {data!r}; keys and values are needed: {', '.join(_keys(cls))}")
    hints = typing.get_type_hints(cls)
    fields = {_key(f.name): f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    owns_kind = "kind" in fields
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key == "kind" and not owns_kind and hasattr(cls, "kind"):
            continue
        if key not in fields:
            raise KeyPathError((*path, key), f"unknown key{nearest(str(key), fields) or '; the keys are ' + ', '.join(fields)}")
        values[fields[key].name] = convert(hints[fields[key].name], value, (*path, key))
    for key, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise KeyPathError(path, f"the key {key!r} is missing")
    try:
        return cls(**values)
    except TorchoptError as error:
        raise KeyPathError(path, str(error)) from error


def convert(hint: Any, value: object, path: Path) -> Any:
    """Return `value` as the type `hint` asks for.

    Raises:
        KeyPathError: it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise KeyPathError(path, f"{value!r} is not one of {choices}{nearest(str(value), map(str, arguments))}")
        return value
    if origin in (collections.abc.Sequence, collections.abc.Iterable, list, tuple):
        return _sequence(arguments, value, path)
    if origin in (collections.abc.Mapping, dict) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise KeyPathError(path, f"got {value!r}; keys and values are needed")
        kept = arguments[1] if len(arguments) > 1 else Any
        return {key: convert(kept, one, (*path, key)) for key, one in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path)
    return _scalar(hint, value, path)


def _one_of(hints: Sequence[Any], value: object, path: Path) -> Any:
    if value is None and type(None) in hints:
        return None
    classes = [h for h in hints if dataclasses.is_dataclass(h) and isinstance(h, type)]
    if isinstance(value, Mapping) and classes:
        return build(classes[0] if len(classes) == 1 else _of_kind(classes, value, path), value, path)
    code = collections.abc.Callable  # no plain value is a function
    others = [h for h in hints if h is not type(None) and h not in classes and typing.get_origin(h) is not code]
    for hint in sorted(others, key=lambda h: h is str):  # text last: it would take what another type reads better
        try:
            return convert(hint, value, path)
        except KeyPathError as error:
            if error.path != path:  # the right type, with a mistake deeper inside
                raise
    expected = " or ".join([*(_name(h) for h in others), *(f"keys and values of {c.__name__}" for c in classes)])
    raise KeyPathError(path, f"got {value!r}; {expected} is needed")


def _of_kind(classes: Sequence[type], value: Mapping[str, Any], path: Path) -> type:
    if "import" in value:
        for cls in classes:
            if "import" in _keys(cls):
                return cls
    if "kind" not in value:
        raise KeyPathError(path, f"the key 'kind' is missing; one of {', '.join(_kinds(classes))}")
    for cls in classes:
        if getattr(cls, "kind", None) == value["kind"]:
            return cls
    for cls in classes:
        if "kind" in _keys(cls):
            return cls
    kinds = _kinds(classes)
    raise KeyPathError((*path, "kind"), f"{value['kind']!r} is not one of {', '.join(kinds)}{nearest(str(value['kind']), kinds)}")


def _kinds(classes: Sequence[type]) -> list[str]:
    kinds = (getattr(cls, "kind", None) for cls in classes)
    return [kind for kind in kinds if isinstance(kind, str)]


def _sequence(arguments: Sequence[Any], value: object, path: Path) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise KeyPathError(path, f"got {value!r}; a list is needed")
    if len(arguments) > 1 and arguments[1] is not Ellipsis:
        if len(value) != len(arguments):
            raise KeyPathError(path, f"got {len(value)} values; {len(arguments)} are needed")
        return tuple(convert(h, v, (*path, i)) for i, (h, v) in enumerate(zip(arguments, value, strict=True)))
    hint = arguments[0] if arguments else Any
    return tuple(convert(hint, v, (*path, i)) for i, v in enumerate(value))


def _scalar(hint: Any, value: object, path: Path) -> Any:
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text: it wants a dot before the e
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise KeyPathError(path, f"got {value!r}; {_name(hint)} is needed")


def _name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    return (
        "a list" if typing.get_origin(hint) in (collections.abc.Sequence, tuple, list) else getattr(hint, "__name__", str(hint))
    )


def _key(field: str) -> str:
    return field.rstrip("_")


def _keys(cls: Any) -> list[str]:
    return [_key(f.name) for f in dataclasses.fields(cls) if f.init]
