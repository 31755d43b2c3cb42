"""YAML with the line of each key, so that a mistake can be pointed at; and putting values into what was read."""

from __future__ import annotations

from typing import Any

import yaml

from torchopt import strict
from torchopt.errors import ConfigError
from torchopt.strict import Path


def read_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Return the plain data of a YAML text, and the line of each key path.

    Raises:
        ConfigError: not YAML, or a key that stands twice.

    Example:
        >>> read_yaml("a: 1\\nb: {c: 2}", "f.yaml")
        ({'a': 1, 'b': {'c': 2}}, {(): 1, ('a',): 1, ('b',): 2, ('b', 'c'): 2})
    """
    loader = yaml.SafeLoader(text)
    lines: dict[Path, int] = {(): 1}
    try:
        node = loader.get_single_node()
        plain = _construct(loader, node, (), lines, name) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name}{where}: not YAML: {problem}") from error
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    return plain, lines


def _construct(loader: yaml.SafeLoader, node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in found:
                raise ConfigError(f"{name}:{key_node.start_mark.line + 1}: {strict.dotted((*path, key))}: stands here twice")
            found[key] = _construct(loader, value_node, (*path, key), lines, name)
            lines[(*path, key)] = key_node.start_mark.line + 1
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, i), lines, name) for i, item in enumerate(node.value)]
    if node.tag.endswith((":int", ":float")) and ":" in node.value:
        return node.value  # YAML 1.1 would read the pattern 2:4 as 2·60 + 4
    return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]


def line_of(lines: dict[Path, int], path: Path) -> int:
    """Return the line of a key path, or of the nearest thing around it that the text holds."""
    while path not in lines:
        path = path[:-1]
    return lines[path]


def put(place: Any, parts: list[str], value: object, *, where: str) -> None:
    """Put a value into nested plain data, in place; mappings on the way are made, list places must exist.

    Raises:
        ConfigError: a place that a list does not have, or a key of something that has none; opens with `where`.

    Example:
        >>> data = {"stages": [{"train": {"epochs": 20}}]}
        >>> put(data, ["stages", "0", "train", "epochs"], 1, where="--set")
        >>> data
        {'stages': [{'train': {'epochs': 1}}]}
    """
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"{where}: {part!r} is no place in a list of {len(place)}; 0 to {len(place) - 1} are")
            index: Any = int(part)
        elif isinstance(place, dict):
            index = part
        else:
            raise ConfigError(f"{where}: {'.'.join(parts[:number])} is {place!r}, which has no keys")
        if last:
            place[index] = value
        else:
            place = place.setdefault(index, {}) if isinstance(place, dict) else place[index]
