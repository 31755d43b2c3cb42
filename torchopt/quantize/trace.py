"""From a module to its graph: symbolic tracing that leaves alone what it cannot follow.

A submodule whose forward depends on data (`if x.sum() > 0`) is kept whole as a leaf, and its inner layers get what needs no graph; if
it is the model's own forward that cannot be followed, nothing can be placed, and the error names the line and the remedy.
"""

from __future__ import annotations

import copy
import traceback
from typing import Any

from torch import fx, nn
from torch.ao.quantization.fx.tracer import QuantizationTracer

from torchopt.errors import ModelError


class Tracer(QuantizationTracer):
    """torch.ao's tracer, which remembers where it is."""

    def __init__(self, leaves: list[str]) -> None:
        super().__init__(leaves, [])
        self.inside: list[str] = []

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace into `m`, and remember it while an error may come from it."""
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


class QuantizableGraph(fx.GraphModule):
    """A graph module whose deep copies keep submodules that the graph does not call, such as torchopt's step counter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizableGraph:
        twin: Any = super().__deepcopy__(memo)
        for name, module in self._modules.items():
            if name not in twin._modules:
                twin.add_module(name, copy.deepcopy(module, memo))
        return twin  # type: ignore[no-any-return]


def trace(model: nn.Module) -> tuple[QuantizableGraph, list[str]]:
    """Return the graph of `model` over its own submodules, and the paths of those that could not be followed.

    Raises:
        ModelError: the model's own forward cannot be traced.
    """
    leaves: list[str] = []
    while True:
        tracer = Tracer(leaves)
        try:
            graph = tracer.trace(model)
        except Exception as error:  # whatever the model's code does with a proxy
            if not tracer.inside or tracer.inside[-1] in leaves:
                raise ModelError(_untraceable(model, error)) from error
            leaves = [*leaves, tracer.inside[-1]]
            continue
        traced = QuantizableGraph(model, graph, type(model).__name__)
        traced.train(model.training)
        return traced, leaves


def _untraceable(model: nn.Module, error: Exception) -> str:
    """Where tracing failed, in the user's own code, and what helps."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and "torchopt" not in f.filename
    ]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "its forward"
    return (
        f"quantize: the forward of {type(model).__name__} depends on data and cannot be traced ({where}): "
        f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; move that part into a submodule, "
        "or use Quantize(mode='dynamic') or Quantize(mode='weight_only')"
    )
