"""YAML with the line of each key, so that a mistake can be pointed at; and putting values into what was read."""

from __future__ import annotations

from typing import Any

import yaml

from torchopt.errors import ConfigError
from torchopt.io import schema as strict
from torchopt.io.schema import Path

MOST_VALUES = 100_000  # nested anchors can stand for as many as they like


def read_yaml(text: str, name: str) -> tuple[Any, dict[Path, int]]:
    """Return the plain data of a YAML text, and the line of each key path.

    Raises:
        ConfigError: not YAML, or a key that stands twice.

    Example:
        >>> read_yaml("a: 1\\nb: {c: 2}", "f.yaml")
        ({'a': 1, 'b': {'c': 2}}, {(): 1, ('a',): 1, ('b',): 2, ('b', 'c'): 2})
    """
    lines: dict[Path, int] = {(): 1}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        plain = _Reader(loader, lines, name).read(node, ()) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name}{where}: not YAML: {problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deeply; a recipe has a few levels") from error
    return plain, lines


class _Reader:
    """Nodes of YAML to plain data; anchors may stand for parts (`*a`, `<<: *a`), but not for what they are in."""

    def __init__(self, loader: yaml.SafeLoader, lines: dict[Path, int], name: str) -> None:
        self.loader, self.lines, self.name = loader, lines, name
        self.inside: list[int] = []

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if len(self.lines) > MOST_VALUES:
            raise ConfigError(f"{self.name}: holds more than {MOST_VALUES} values; a recipe has a few dozen")
        if id(node) in self.inside:
            raise ConfigError(f"{self._at(node, path)}: an anchor stands for what it is in; write the part out")
        self.inside.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.inside.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = self._merged(value_node, path) | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self._at(key_node, path)}: got a list or mapping as a key; a name is needed")
            key = self._scalar(key_node, path)
            if key in found:
                raise ConfigError(f"{self._at(key_node, (*path, key))}: stands here twice")
            found[key] = self.read(value_node, (*path, key))
            self.lines[(*path, key)] = key_node.start_mark.line + 1
        return {**merged, **found}

    def _merged(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """What `<<` brings: of several, the first one counts."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        total: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise ConfigError(f"{self._at(node, path)}: '<<' merges keys and values; an anchor of some is needed")
            total = self.read(part, path) | total
        return total

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        if node.tag.endswith((":int", ":float")) and ":" in node.value:
            return node.value  # YAML 1.1 would read the pattern 2:4 as 2·60 + 4
        try:
            return self.loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
        except (
            ValueError,
            OverflowError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:  # as 2020-13-45, which looks like a date
            value = node.value if len(node.value) <= 40 else f"{node.value[:40]}…"
            raise ConfigError(f"{self._at(node, path)}: got {value}; {str(error).splitlines()[0]}") from error

    def _at(self, node: yaml.Node, path: Path) -> str:
        dotted = strict.dotted(path)
        return f"{self.name}:{node.start_mark.line + 1}" + (f": {dotted}" if dotted else "")


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
            if not (part.isascii() and part.isdigit()) or int(part) >= len(place):
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
