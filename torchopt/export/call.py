"""The call that a file is made of: its tensors in a row, their names, and which of their dimensions are free.

Every tensor of the arguments, at any depth, is one input of the file. A network whose arguments or results are nested, or given by
keyword, is put behind a forward that takes and gives a row of tensors: the same class, so that its weights keep their names.

    dynamic_shapes={"x": {0: "batch", 2: "height", 3: "width"}}      by the names of forward's arguments, free dimensions by name
    dynamic_shapes={"states": [{1: "time"}, None]}                   nested as the argument is
    torch.export's own form, with `Dim` objects, by name or as a tuple
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from torchopt.errors import ConfigError, DataError, nearest
from torchopt.network.structure import leaves, nested, rebuilt

BATCH = "batch"
Free = tuple[dict[int, str], ...]  # of each tensor: the names of its free dimensions


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a network.

    Attributes:
        args: the positional arguments as they were given.
        kwargs: those by keyword.
        inputs: what the network, or the forward before it, takes in a row: tensors, and constants among the positional ones.
        names: of `inputs`.
        free: of each of `inputs`.
        flat: a forward of tensors alone stands before the network's.
        output_names: what the outputs shall be called, or None.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Any, ...]
    names: tuple[str, ...] | None
    free: Free
    flat: bool
    output_names: tuple[str, ...] | None = None

    @property
    def shapes(self) -> tuple[Any, ...] | None:
        """The free dimensions as torch.export takes them."""
        if not any(self.free):
            return None
        dims = {name: Dim(name) for row in self.free for name in row.values()}
        return tuple({at: dims[n] for at, n in row.items()} or None for row in self.free)

    def in_a_row(self) -> Call:
        """The same with a forward of tensors alone before the network's."""
        kept = [i for i, x in enumerate(self.inputs) if isinstance(x, torch.Tensor)]
        inputs, free = (tuple(row[i] for i in kept) for row in (self.inputs, self.free))
        names = None if self.names is None else tuple(self.names[i] for i in kept)
        return replace(self, inputs=inputs, free=free, names=names, flat=True)


def call_of(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Call:
    """Return the call with its free dimensions.

    Raises:
        ConfigError: a name, a dimension or a size that does not fit the inputs.
        DataError: the example inputs are not a tuple with tensors.
    """
    kwargs = dict(example_kwargs or {})
    if not isinstance(example_inputs, tuple) or not any(isinstance(x, torch.Tensor) for _, x in leaves((example_inputs, kwargs))):
        raise DataError(
            f"export: example_inputs is {type(example_inputs).__name__}; a tuple with the tensors of one call is needed"
        )
    top = dict(zip(_names(model, example_inputs), example_inputs, strict=True)) | kwargs
    flat = bool(kwargs) or any(map(nested, top.values()))
    rows = list(leaves(top)) if flat else list(top.items())
    given = dict(_spelled(top, dynamic_shapes))
    kept = [(n, x) for n, x in rows if isinstance(x, torch.Tensor)] if flat else rows
    free = tuple(_free(name, x, given.get(name), dynamic_batch) for name, x in kept)
    _check_sizes(kept, free)
    names = tuple(name for name, _ in kept)
    if input_names is not None:
        tensors = sum(isinstance(x, torch.Tensor) for _, x in kept)
        if len(input_names) != tensors or len(set(input_names)) != tensors:
            raise ConfigError(
                f"export: input_names={list(input_names)}; {tensors} different names are needed, for {', '.join(names)}"
            )
        others = iter(input_names)
        names = tuple(next(others) if isinstance(x, torch.Tensor) else n for n, x in kept)
    if flat:
        names = (
            tuple(re.sub(r"\W", "_", f"input_{n}" if n[:1].isdecimal() else n) for n in names) if input_names is None else names
        )
    unnamed = any(n.isdecimal() for n in names)
    return Call(
        args=example_inputs,
        kwargs=kwargs,
        inputs=tuple(x for _, x in kept),
        names=None if unnamed else names,
        free=free,
        flat=flat,
        output_names=None if output_names is None else tuple(output_names),
    )


def by_row(model: nn.Module, call: Call) -> nn.Module:
    """Let a network take, and give, tensors in a row; in place.

    Its class becomes one of its class, so that copies do the same.
    """
    cls = type(model)
    parameters = [inspect.Parameter(f"x{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(len(call.inputs))]

    def forward(self: nn.Module, *row: Any) -> tuple[Any, ...]:
        given = iter(row)
        filled = (next(given) if isinstance(x, torch.Tensor) else x for _, x in leaves((call.args, dict(call.kwargs))))
        args, kwargs = rebuilt((call.args, dict(call.kwargs)), filled)
        result = cls.forward(self, *args, **kwargs)
        return tuple(x for _, leaf in leaves(result) for x in tree_leaves(leaf) if isinstance(x, torch.Tensor))

    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([self_, *parameters])  # type: ignore[attr-defined]
    model.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    return model


def _names(model: nn.Module, example_inputs: Sequence[Any]) -> list[str]:
    """The names of forward's positional arguments; numbers under `*args`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds][: len(example_inputs)]
    return [*names, *(str(i) for i in range(len(names), len(example_inputs)))]


def _spelled(top: Mapping[str, Any], asked: Any) -> Iterator[tuple[str, Any]]:
    """What is asked for of each tensor, by its name."""
    if asked is None:
        return
    if isinstance(asked, list | tuple):
        if len(asked) > len(top):
            raise ConfigError(
                f"export: dynamic_shapes has {len(asked)} entries, and the call {len(top)} inputs: {', '.join(top)}"
            )
        asked = dict(zip(top, asked, strict=False))
    if not isinstance(asked, Mapping):
        raise ConfigError(f'export: dynamic_shapes={asked!r}; a dict such as {{"x": {{0: "batch"}}}} is needed')
    for name, wanted in asked.items():
        if name not in top:
            raise ConfigError(f"export: dynamic_shapes names {name!r}; the inputs are {', '.join(top)}{nearest(str(name), top)}")
        yield from _nested(name, top[name], wanted)


def _nested(name: str, value: Any, asked: Any) -> Iterator[tuple[str, Any]]:
    if asked is None:
        return
    if not nested(value):
        yield name, asked
        return
    children = (
        dict(value)
        if isinstance(value, Mapping)
        else vars(value)
        if not isinstance(value, list | tuple)
        else dict(enumerate(value))
    )
    keyed = dict(asked) if isinstance(asked, Mapping) else dict(zip(children, asked, strict=False))
    for key, wanted in keyed.items():
        if key not in children:
            raise ConfigError(f"export: dynamic_shapes names {key!r} in {name}; it holds {', '.join(map(str, children))}")
        yield from _nested(f"{name}_{key}", children[key], wanted)


def _free(name: str, value: Any, asked: Any, dynamic_batch: bool) -> dict[int, str]:
    """The free dimensions of one tensor."""
    if not isinstance(value, torch.Tensor):
        return {}
    found: dict[int, str] = {0: BATCH} if dynamic_batch and value.dim() else {}
    pairs = asked.items() if isinstance(asked, Mapping) else enumerate(asked or ())
    for at, dim in pairs:
        if not isinstance(at, int) or not -value.dim() <= at < value.dim():
            raise ConfigError(f"export: dynamic_shapes frees dimension {at!r} of {name}, which has {value.dim()} dimensions")
        if dim is None or isinstance(dim, int) or "STATIC" in str(dim):
            continue
        label = dim if isinstance(dim, str) else getattr(dim, "__name__", "")
        label = label if label.isidentifier() else f"{name}_{at % value.dim()}"
        if at % value.dim() == 0 and not dynamic_batch:
            raise ConfigError(
                f"export: dynamic_shapes frees dimension 0 of {name}, and dynamic_batch=False fixes it; leave one out"
            )
        found[at % value.dim()] = label
    return dict(sorted(found.items()))


def _check_sizes(rows: Sequence[tuple[str, Any]], free: Free) -> None:
    """Refuse a name with two sizes, and a size that torch's exporter takes for a constant."""
    seen: dict[str, tuple[str, int, int]] = {}
    for (name, x), row in zip(rows, free, strict=True):
        for at, label in row.items():
            first = seen.setdefault(label, (name, at, x.shape[at]))
            if first[2] != x.shape[at] and label != BATCH:
                raise ConfigError(
                    f"export: dimension {label!r} is {first[2]} in {first[0]} and {x.shape[at]} in {name}; one size is needed for one name"
                )
            if x.shape[at] < 2 and at:
                raise ConfigError(
                    f"export: dimension {label!r} of {name} is {x.shape[at]} in the example, which the exporter takes for fixed; "
                    "give an example of 2 or more"
                )
