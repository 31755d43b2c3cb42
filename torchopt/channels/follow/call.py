"""One call of an operator, as the dispatcher sees it, with its arguments by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Call:
    """One call of an operator.

    Attributes:
        name: without its library, its overload, and the underscore of operators that work in place.
        given: the arguments by name, with defaults.
        tensors: the tensors among the arguments, also those in lists, in order.
        results: the tensors that came out.
    """

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = func._schema.name.split("::")[-1].removesuffix("_")
        names = [argument.name for argument in func._schema.arguments]
        self.given = {a.name: a.default_value for a in func._schema.arguments} | dict(zip(names, args, strict=False)) | kwargs
        self.tensors = [t for value in [*args, *kwargs.values()] for t in tensors_in(value)]
        self.results = tensors_in(result)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return a tensor, or the tensors of a list of them."""
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, torch.Tensor)]
