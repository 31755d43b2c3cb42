"""Walk through a prepared model layer by layer, as the float network and as the rounded one, side by side.

What a correction of layer l needs is the output of the float network after l, and the input of l in the network whose earlier layers
are rounded (and corrected) already:  y = f_l(x),  x̂ = f̂_{l−1}(…f̂_1(x_0)). Both runs go node by node over the same samples, so that
the whole walk costs two forward passes, and a value is kept only until its last reader has run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from torchopt.errors import ModelError
from torchopt.network.surgery import module_of
from torchopt.quantize.calibration.batch_slices import Call
from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.kernels import IntegerKernel
from torchopt.quantize.layers.modules import Fused

Env = dict[fx.Node, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Visit:
    """One layer on the way: its rounded inputs, and the float network's outputs after batch norm and before the activation.

    Both hold one tensor a call; `floats` is empty on a walk without the float network.
    """

    name: str
    layer: Fused
    inputs: list[torch.Tensor]
    floats: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sides:
    """The values of the graph so far, one dictionary a call: of the float network and of the rounded one."""

    floats: list[Env]
    rounded: list[Env]


def walk(model: nn.Module, calls: Sequence[Call], *, floats: bool = True) -> Iterator[Visit]:
    """Yield each quantized layer once, in the order of the graph; what the caller changes in it, later layers see.

    Args:
        model: what `attach` returned for static quantization, under `rounding`.
        calls: the samples, as the arguments of the model.
        floats: run the float network beside the rounded one; without it the walk takes half the time and memory.

    Raises:
        ModelError: the model has no graph to walk along.
    """
    if not isinstance(model, fx.GraphModule):
        raise ModelError(
            f"calibrate: {type(model).__name__} is not a traced model, corrections need its graph; use mode='static'"
        )
    names = model.graph.find_nodes(op="placeholder")
    given = [dict(zip(names, values, strict=True)) for values in ordered(model, calls)]
    sides = Sides(floats=[dict(env) for env in given] if floats else [], rounded=given)
    runner = fx.Interpreter(model, garbage_collect_values=False)
    seen: set[nn.Module] = set()
    last = _last_uses(model.graph)
    for node in model.graph.nodes:
        if node.op == "output":
            return
        module = module_of(model, node)
        if isinstance(module, Fused):
            yield from _layer(runner, node, module, sides, seen)
        elif node.op != "placeholder":
            with _as_is(module):
                _advance(runner, node, sides.floats)
            _advance(runner, node, sides.rounded)
        for env in (*sides.floats, *sides.rounded):
            for done in last[node]:
                del env[done]


def _layer(runner: fx.Interpreter, node: fx.Node, layer: Fused, sides: Sides, seen: set[nn.Module]) -> Iterator[Visit]:
    """Run a quantized layer on both sides; between the two, let the caller see and change it."""
    act, layer.act = layer.act, None
    with _as_is(layer), folded_once([layer]):
        _advance(runner, node, sides.floats)
    layer.act = act
    if layer not in seen:
        seen.add(layer)
        inputs = [env[node.all_input_nodes[0]] for env in sides.rounded]
        yield Visit(name=str(node.target), layer=layer, inputs=inputs, floats=[env[node] for env in sides.floats])
    for env in sides.floats:
        env[node] = env[node] if act is None else act(env[node])
    with folded_once([layer]):
        _advance(runner, node, sides.rounded)


def holds_table(layer: Fused) -> bool:
    """True where a table of shared values holds the layer's weight, masked or not."""
    return any(parametrize.is_parametrized(layer, name) for name in ("weight", "weight_orig"))


@contextmanager
def rounding(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Evaluation mode with every quantizer on (or off), whatever the milestones say, and back."""
    parts = [m for m in model.modules() if isinstance(m, Fused | ActivationQuantizer | IntegerKernel)]
    training = model.training
    model.eval()
    before = [(part.rounding, part.aside) for part in parts]
    try:
        for part in parts:  # which side a value falls to that lies on the border, corrections need not know
            part.rounding = enabled and not isinstance(part, IntegerKernel)
            part.aside = True  # a change of mode leaves the flag alone
        yield
    finally:
        for part, (was, aside) in zip(parts, before, strict=True):
            part.rounding, part.aside = was, aside
        model.train(training)


@contextmanager
def _as_is(module: nn.Module | None) -> Iterator[None]:
    """Run a module without its rounding."""
    if isinstance(module, Fused | ActivationQuantizer):
        module.rounding = False
    try:
        yield
    finally:
        if isinstance(module, Fused | ActivationQuantizer):
            module.rounding = True


def _advance(runner: fx.Interpreter, node: fx.Node, side: list[Env]) -> None:
    """Run a node for every sample of a side."""
    for env in side:
        runner.env = env
        env[node] = runner.run_node(node)


def ordered(model: fx.GraphModule, calls: Iterable[Call]) -> Iterator[list[Any]]:
    """Yield the values of the graph's placeholders, one list a call."""
    for args, kwargs in calls:
        given = list(args)
        yield [
            given.pop(0) if given else kwargs.get(str(node.target), node.args[0] if node.args else None)
            for node in model.graph.find_nodes(op="placeholder")
        ]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Which values are not needed any more after each node."""
    last: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for source in (*node.all_input_nodes, node):
            if source not in seen:
                seen.add(source)
                last[node].append(source)
    return last
