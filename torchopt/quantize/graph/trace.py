"""From a module to its graph: symbolic tracing that knows the shapes, and leaves alone what it cannot follow.

Every value of the graph has an example beside it, a `FakeTensor` with a shape and no data. So tracing follows control flow that depends
on shapes only (`if x.dim() == 3`, padding to a multiple of the window, one tensor cropped to another), and the graph still computes with
the sizes that it is given. A submodule whose forward depends on data (`if x.sum() > 0`) is kept whole as a leaf, and its inner layers
get what needs no graph; if it is the model's own forward that cannot be followed, the error names the line.

Functions that a library marks as leaves (`torch.fx.wrap`, as torchvision does around window attention) are followed where they can be.
Networks are traced in evaluation mode, which is what is deployed. Modules that only regularize in training (stochastic depth) stay
modules, so that training turns them on; so do dropout functions (`dropout.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.errors import ModelError
from torchopt.network.surgery import evaluating, set_module
from torchopt.quantize.graph.dropout import as_modules
from torchopt.quantize.graph.functional import call_layers, computed_weights, drop_identities, move_inner
from torchopt.quantize.graph.graphs import HOOKS, QuantizableGraph, Was
from torchopt.quantize.graph.mutation import LIBRARIES, put_instead, take_any_layout, write_as_values
from torchopt.quantize.graph.ranks import answer_ranks
from torchopt.quantize.graph.tracer import Tracer, example, only_marked


def trace(model: nn.Module, example_inputs: tuple[Any, ...] = ()) -> tuple[QuantizableGraph, list[str]]:
    """Return the graph of `model` over its own submodules, and the paths of those that could not be followed.

    Args:
        model: a network.
        example_inputs: one call's positional arguments; only their shapes and types matter.

    Raises:
        ModelError: the model's own forward cannot be traced.
    """
    leaves: list[str] = []
    fixed = _left_out(model, example_inputs)
    with _slow_attention(), evaluating(model):
        while True:
            tracer = Tracer(leaves, example_inputs)
            try:
                graph = tracer.trace(model, concrete_args=fixed)
            except Exception as error:  # whatever the model's code does with a proxy
                if tracer.inside and tracer.inside[-1] not in leaves:
                    leaves = [*leaves, tracer.inside[-1]]
                else:
                    raise ModelError(_untraceable(model, error)) from error
            else:
                break
    _require(graph, example_inputs)
    return _traced(model, graph), leaves


def _traced(model: nn.Module, graph: fx.Graph) -> QuantizableGraph:
    for node in graph.nodes:
        if not only_marked(node.target):  # torch.fx took it for the function that was followed to it
            node.meta.pop("is_wrapped", None)
    answer_ranks(graph, example)
    _call_linear_layers(model, graph)
    layers = call_layers(model, graph, example)
    reasons = computed_weights(model, graph)
    drop_identities(model, graph)
    moved = move_inner(model, graph, layers)
    for name, module in moved.items():
        model.add_module(name, module)
    take_any_layout(graph)
    write_as_values(model, graph, example)
    traced = QuantizableGraph(model, graph, type(model).__name__)
    for path, layer in layers.items():
        set_module(traced, path, layer)
    as_modules(traced)
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_") and name not in vars(traced)}
    type(traced).was = Was(of=type(model), attributes=plain, left=reasons)
    for hooks in HOOKS:
        getattr(traced, hooks).update(getattr(model, hooks))
    traced.train(model.training)
    return traced


def _call_linear_layers(model: nn.Module, graph: fx.Graph) -> None:
    """Write `F.linear(x, layer.weight, bias)` as a call of that layer (window attention reads its layers so).

    Another bias than the layer's own is added as their difference: swin_v2 silences a part of its layer's.
    """
    for node in graph.find_nodes(op="call_function", target=F.linear):
        x, weight, bias = (*node.args, *(node.kwargs[k] for k in ("weight", "bias") if k in node.kwargs), None)[:3]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        path, _, name = str(weight.target).rpartition(".")
        layer = model.get_submodule(path)
        if name != "weight" or type(layer) is not nn.Linear or (bias is None and layer.bias is not None):
            continue
        own = bias is None or (isinstance(bias, fx.Node) and bias.target == f"{path}.bias")
        with graph.inserting_before(node):
            call = graph.call_module(path, (x,))
            call.meta.update(node.meta)
            if not own:
                apart = bias if layer.bias is None else graph.call_function(torch.sub, (bias, graph.get_attr(f"{path}.bias")))
                call = graph.call_function(torch.add, (call, apart))
                call.meta.update(node.meta)
        put_instead(graph, node, call)


def _require(graph: fx.Graph, example_inputs: tuple[Any, ...]) -> None:
    """Take the defaults away from what the example gives: the graph is that of a call with it, and says so by its signature."""
    for node, given in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if given is not None and not str(node.target).startswith("*"):
            node.args = ()


def _left_out(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Optional arguments that the example leaves at None, such as masks: fixed so, where the forward asks which it is."""
    parameters = list(inspect.signature(model.forward).parameters.values())[len(example_inputs) :]
    return {p.name: None for p in parameters if p.default is None}


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep torch's encoder layers from the fused kernel, which goes past their own submodules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _untraceable(model: nn.Module, error: Exception) -> str:
    """Where tracing failed, in the user's own code, and what helps."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(LIBRARIES)]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else "its forward"
    return (
        f"quantize: the forward of {type(model).__name__} depends on data and cannot be traced ({where}): "
        f"{str(error).splitlines()[0].split('. ')[0] if str(error) else type(error).__name__}; move that part into a submodule, "
        "or use Quantize(mode='dynamic') or Quantize(mode='weight_only')"
    )
