"""The weight of a quantized layer where another reads it: `F.linear(h, embedding.weight)`, `x @ layer.weight.T`.

So are the weights of modules that have no quantized layer (`bare_weights.py`): cells, bags of embeddings, code of the model's own.

The layer itself rounds its weight in each call. Whoever else reads `layer.weight` while the model runs gets the same rounded weight,
with the same gradient, as the finalized model will give it; outside of a forward pass `layer.weight` is the Parameter that trains.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx, nn

from torchopt.network.computed import cover, covered, uncover
from torchopt.network.weights import Weight
from torchopt.quantize.layers.bare_weights import later, snapped, weights_later
from torchopt.quantize.layers.modules import Fused
from torchopt.state.marks import mark, marked, unmark

_now = threading.local()  # how many models are running in this thread
READING = "_torchopt_reading"  # on a layer whose weight is being rounded for another


def round_for_readers(model: nn.Module) -> None:
    """Let the layers of a prepared model round their weights for whoever else reads them, in place.

    Of a traced model these are the layers whose weights the graph reads; of another one they may be all.
    """
    found = _read_by(model) if isinstance(model, fx.GraphModule) else [m for m in model.modules() if isinstance(m, Fused)]
    layers = [layer for layer in found if layer is not model]
    others = [(module, weight) for module in model.modules() if module is not model for weight in _snapped_later(module)]
    for module, weight in others:
        cover(module, weight.param, _snapped)
    if layers or others:
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    for layer in layers:
        cover(layer, "weight", _rounded)


def stop_rounding(model: nn.Module) -> None:
    """Take off what `round_for_readers` put on, in place."""
    for module in model.modules():
        for _ in [0] if isinstance(module, Fused) else _snapped_later(module):
            uncover(module)
    for hooks, ours in ((model._forward_pre_hooks, _enter), (model._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]  # type: ignore[attr-defined]
            model._forward_hooks_always_called.pop(key, None)


def read_paths(traced: fx.GraphModule) -> set[str]:
    """The paths of the modules of which a graph reads a weight by itself.

    Example:
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(4, 2)
        ...     def forward(self, x):
        ...         return self.table(x) @ self.table.weight.T
        >>> read_paths(fx.symbolic_trace(Tied()))
        {'table'}
    """
    return {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr" and node.users}


def _read_by(traced: fx.GraphModule) -> list[nn.Module]:
    """The layers of which the graph reads the weight, and those inside of modules that it calls as a whole."""
    calls, reads = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}, read_paths(traced)
    return [m for path, m in traced.named_modules() if isinstance(m, Fused) and (path in reads or path not in calls)]


def _snapped_later(module: nn.Module) -> list[Weight]:
    """The weights that are rounded where they are read; those of a graph's own are read by their names, and baked."""
    told = None if isinstance(module, fx.GraphModule) else later(module)
    return [] if told is None or told.config.mode == "float16" else weights_later(module)


def _snapped(module: nn.Module, name: str) -> torch.Tensor:
    """The weight as it will be baked while some model runs and rounds, else as it is."""
    value = cast(torch.Tensor, covered(module, name))
    running = torch.compiler.is_compiling() or getattr(_now, "running", 0) > 0
    if not running or getattr(_now, "aside", False) or marked(module, READING):
        return value
    mark(module, READING, True)
    try:
        weight = next(weight for weight in weights_later(module) if weight.param == name)
        return snapped(module, weight, value)[0]
    finally:
        unmark(module, READING)


@contextlib.contextmanager
def not_snapped() -> Iterator[None]:
    """Models run in this thread on such weights as they are."""
    _now.aside = getattr(_now, "aside", 0) + 1
    try:
        yield
    finally:
        _now.aside -= 1


def _enter(module: nn.Module, inputs: object) -> None:
    if not torch.compiler.is_compiling():
        _now.running = getattr(_now, "running", 0) + 1


def _leave(module: nn.Module, inputs: object, output: object) -> None:
    if not torch.compiler.is_compiling():
        _now.running -= 1


def _rounded(module: nn.Module, name: str) -> torch.Tensor:
    """The weight as the layer uses it while some model runs, else the Parameter."""
    layer, weight = cast(Fused, module), cast(torch.Tensor, covered(module, name))
    running = torch.compiler.is_compiling() or getattr(_now, "running", 0) > 0
    if not (running and layer.rounding) or layer.bn is not None or marked(layer, READING):
        return weight
    held: Any = layer.held
    if held is not None:
        return cast(torch.Tensor, held[0])
    mark(layer, READING, True)
    try:
        return layer.fake_quantized(weight) if layer.training else layer.folded(weight)[0]
    finally:
        unmark(layer, READING)
