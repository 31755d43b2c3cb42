"""`fallback="auto"`: the front of a network, where gated activations on many pixels make integers slower than floats, stays float.

A Hardswish costs nothing in float, where ONNX Runtime fuses it into its convolution, and as integers two operations on every value
(`gates.py`). That pays where convolutions are wide. In front they are not: few channels on many pixels, which integer kernels, whose work
is to gather and to round, like least. So the layers up to a value v stay float where

    rounding of v + Σ float  <  rounding of the input + Σ integer        over the operations before v

v is one of those that everything after them goes through, and the one with the largest difference. What operations cost is the target's
(`targets.Costs`, nanoseconds on one core); for a network without such activations, or a target without costs, all layers run as integers.
MobileNetV3-small, 224×224: 0.80 of float's time with its front as integers, 0.71 with the first two convolutions float; MobileNetV3-large
0.59 and 0.58, EfficientNet-b0 0.70 and 0.68. That is asked for, and not the default, because a float front costs exactness: its results
differ in the last bits from one runtime to the next, and where the integers begin some of them round to another side (`kernels.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.network.surgery import module_of
from torchopt.quantize.graph.dropout import regularizes
from torchopt.quantize.graph.fuse import activation_of
from torchopt.quantize.graph.gates import gate_of
from torchopt.quantize.graph.tracer import example
from torchopt.quantize.targets import Costs, Target

ENTRANCE = "entrance"  # in the meta of a node: its value is where the integers begin
SMALLEST = 20e3  # ns that must be gained: below it the overhead of calls decides
POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)
POOLING = {F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, torch.mean, "mean"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul"}
SUMS = {operator.add, operator.iadd, torch.add, "add"}
UNITS = (nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Nanoseconds as integers and in float; `absorbed` by the operation before it."""

    integer: float
    floating: float
    absorbed: bool = False
    gated: bool = False


def leave_front(traced: fx.GraphModule, assignment: dict[str, Any], target: Target) -> dict[str, str]:
    """Return why, by path, of the layers of the front that are faster in float; the value after them is marked in the graph."""
    free = {path for path, config in assignment.items() if config.fallback == "auto"}
    if target.costs is None or not free:
        return {}
    best, front = -SMALLEST, None
    for node, layers, gain in _fronts(traced, target.costs):
        if -gain < best and free.issuperset(layers):
            best, front = -gain, (node, layers)
    if front is None:
        return {}
    node, layers = front
    node.meta[ENTRANCE] = True
    reason = (
        f"in the front of the network, with its gated activations, integers take {-best / 1e6:.2f} ms longer than floats "
        f"by the costs measured for {target.name}; it stays float"
    )
    return dict.fromkeys(layers, reason)


def _fronts(traced: fx.GraphModule, costs: Costs) -> Iterator[tuple[fx.Node, list[str], float]]:
    """Yield values that everything after them goes through, the layers before them, and what float there gains."""
    nodes = list(traced.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    layers: list[str] = []
    integer = floating = 0.0
    gated = False
    for i, node in enumerate(nodes):
        cost = _cost(traced, node, costs)
        if cost is None:
            return
        if isinstance(module_of(traced, node), nn.Conv2d):
            layers.append(str(node.target))
        integer, floating, gated = integer + cost.integer, floating + cost.floating, gated or cost.gated
        live = [n for n in nodes[: i + 1] if last[n] > i]
        users = [_cost(traced, user, costs) for user in node.users]
        if gated and live == [node] and not any(user is not None and (user.absorbed or user.gated) for user in users):
            yield node, list(dict.fromkeys(layers)), integer - floating - costs.entrance * _size(node)


def _cost(traced: fx.GraphModule, node: fx.Node, costs: Costs) -> Cost | None:
    """What a node costs; None for what is not known, where the front ends."""
    module = module_of(traced, node)
    kind: Any = type(module) if module is not None else node.target
    if node.op == "placeholder":
        return Cost(integer=costs.input * _size(node), floating=0.0) if _size(node) else None
    if isinstance(module, nn.Conv2d):
        return _convolution(module, node, costs)
    if isinstance(module, _BatchNorm) or activation_of(traced, node) is not None:
        return Cost(integer=0.0, floating=0.0, absorbed=True)
    if isinstance(module, nn.Dropout | nn.Identity) or (module is not None and regularizes(module)):
        return Cost(integer=0.0, floating=0.0)
    size = _size(node)
    if (gate := gate_of(traced, node)) is not None:
        hard = gate is F.hardsigmoid
        each = (costs.hard_gate, 0.0) if hard else (costs.soft_gate, costs.float_gate)
        return Cost(integer=each[0] * size, floating=each[1] * size, gated=True)
    if kind in POOLS or kind in POOLING:
        read = _size(node.all_input_nodes[0])
        return Cost(integer=costs.pool * read, floating=costs.float_pool * read)
    if kind in PRODUCTS:
        return Cost(integer=costs.product * size + costs.pixel * _pixels(node), floating=costs.float_product * size)
    if kind in SUMS:
        return Cost(integer=costs.sum * size, floating=0.0)
    return Cost(integer=costs.unit * size, floating=costs.unit * size) if kind in UNITS else None


def _convolution(conv: nn.Conv2d, node: fx.Node, costs: Costs) -> Cost | None:
    size, pixels, taps = _size(node), _pixels(node), math.prod(conv.kernel_size)
    if not size:
        return None
    products = size * conv.in_channels // conv.groups * taps
    if conv.groups > 1 and conv.groups == conv.in_channels:
        strided = costs.float_stride if max(conv.stride) > 1 else 1.0
        return Cost(
            integer=costs.depthwise * size * taps + costs.pixel * pixels, floating=costs.float_depthwise * products * strided
        )
    gather = costs.tap * pixels * taps if taps > 1 else 0.0
    return Cost(integer=costs.output * size + costs.mac * products + gather, floating=costs.float_mac * products)


def _size(node: fx.Node) -> int:
    """Elements of a value; 0 where it is no tensor."""
    value = example(node)
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _pixels(node: fx.Node) -> int:
    """Positions of a value with channels in axis 1."""
    value = example(node)
    return value.numel() // value.shape[1] if isinstance(value, torch.Tensor) and value.dim() > 1 else 0
