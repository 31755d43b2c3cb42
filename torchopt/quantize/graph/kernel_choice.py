"""Which integer kernel of the runtime gives each rounded value: an `IntegerKernel` put behind its quantizer.

1. a convolution, or a linear layer whose result is rounded, on a grid      → "layer"
2. a sum or a product of two values, each on a grid                         → "addition", "product"
3. a mean over all positions, or over windows, of a value on a grid         → "global_mean", "window_mean"
4. a hardsigmoid of a value on a grid                                       → "hard_sigmoid"
5. all else                                                                 → nothing: QuantizeLinear rounds, as the quantizer does

A ReLU, ReLU6 or Hardtanh between the operation and its quantizer belongs to the kernel; dropout, which is nothing in evaluation, may
stand anywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.network.surgery import module_of
from torchopt.quantize.graph.float_front import PRODUCTS, SUMS
from torchopt.quantize.graph.fuse import activation_of, ends_of
from torchopt.quantize.graph.tracer import example
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.float_layers import FusedLinear
from torchopt.quantize.layers.kernels import LAYER, IntegerKernel, link_kernels
from torchopt.quantize.layers.modules import Fused

MEANS = {torch.mean, "mean"}
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
ADAPTIVE_FUNCTIONS = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
WINDOWS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
WINDOW_FUNCTIONS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


Ends = tuple[float | None, float | None]


class Match(NamedTuple):
    """A kind of kernel, the nodes whose grids it reads, and the nodes whose values it takes."""

    kind: str
    reads: tuple[fx.Node, ...]
    takes: tuple[fx.Node, ...]
    layer: str | None = None


def match_kernels(traced: fx.GraphModule, grids: dict[fx.Node, str], passes: set[fx.Node]) -> None:
    """Put the kernels into a graph in which quantizers are placed, in place.

    Args:
        traced: the graph.
        grids: the name of the quantizer on whose grid the value of a node lies.
        passes: nodes that do nothing in evaluation.
    """
    count = 0
    for node in list(traced.graph.nodes):
        if not isinstance(module_of(traced, node), ActivationQuantizer):
            continue
        source, ends = _through(traced, node.args[0], passes)
        found = _match(traced, source, node.args[0])
        if found is None or not all(read in grids for read in found.reads):
            continue
        name, reads = f"kernel_{count}", [grids[read] for read in found.reads]
        traced.add_module(name, IntegerKernel(found.kind, reads, str(node.target), found.layer, ends))
        with traced.graph.inserting_after(node):
            kernel = traced.graph.call_module(name, (node, *found.takes))
        node.replace_all_uses_with(kernel, delete_user_cb=lambda user, kernel=kernel: user is not kernel)
        grids[kernel] = str(node.target)
        count += 1
    link_kernels(traced)


def _through(traced: fx.GraphModule, node: fx.Node, passes: set[fx.Node]) -> tuple[fx.Node, Ends | None]:
    """The operation that makes a value, and the ends of the activation that follows it."""
    ends: Ends | None = None
    while True:
        activation = activation_of(traced, node)
        if activation is not None and ends is None:
            low, high = ends_of(activation)
            ends = (low if math.isfinite(low) else None, high if math.isfinite(high) else None)
        elif node not in passes:
            return node, ends
        node = node.all_input_nodes[0]


def _match(traced: fx.GraphModule, node: fx.Node, result: fx.Node) -> Match | None:
    """Cases 1 to 5 of the module's docstring; `result` is what the quantizer reads."""
    module, operands = module_of(traced, node), [a for a in node.args if isinstance(a, fx.Node)]
    kind: Any = type(module) if module is not None else node.target
    if isinstance(module, Fused):
        return None if not is_integer_layer(traced, node) else Match(LAYER, (operands[0],), (result,), str(node.target))
    if kind in SUMS or kind in PRODUCTS:
        plain = len(operands) == len(node.args) == 2 and not node.kwargs
        return Match("addition" if kind in SUMS else "product", (*operands,), (*operands,)) if plain else None
    if not operands:
        return None
    x = operands[0]
    if kind in (nn.Hardsigmoid, F.hardsigmoid):
        return Match("hard_sigmoid", (x,), (x,))
    if _is_global(kind, module, node):
        return Match("global_mean", (x,), (x, result))
    if _is_regular(kind, module, node) or isinstance(module, WINDOWS) or kind in WINDOW_FUNCTIONS:
        return Match("window_mean", (x,), (result,))
    return None


def is_integer_layer(traced: fx.GraphModule, node: fx.Node) -> bool:
    """True for a convolution, and for a linear layer on rows whose result is rounded: of more dimensions the bias is added in float."""
    if not isinstance(module_of(traced, node), FusedLinear):
        return True
    rows = getattr(example(node), "shape", ())
    return len(rows) == 2 and all(isinstance(module_of(traced, user), ActivationQuantizer | IntegerKernel) for user in node.users)


def _is_global(kind: Any, module: nn.Module | None, node: fx.Node) -> bool:
    """True for a mean over all positions of each channel."""
    rank = getattr(example(node.all_input_nodes[0]), "ndim", 0)
    over_all = kind in MEANS and rank > 2 and {d % rank for d in _as_set(_argument(node, "dim"))} == set(range(2, rank))
    return over_all or _sizes(kind, module, node) == {1}


def _is_regular(kind: Any, module: nn.Module | None, node: fx.Node) -> bool:
    """True for an adaptive pool whose windows are all alike; with others it is no average pool in the file."""
    if not _sizes(kind, module, node):
        return False
    before, after = (getattr(example(n), "shape", ()) for n in (node.all_input_nodes[0], node))
    return len(before) == len(after) > 2 and not any(a % b for a, b in zip(before, after, strict=True))


def _sizes(kind: Any, module: nn.Module | None, node: fx.Node) -> set[Any]:
    """What an adaptive pool is asked for; empty for anything else."""
    if isinstance(module, ADAPTIVE):
        return _as_set(module.output_size)
    return _as_set(_argument(node, "output_size")) if kind in ADAPTIVE_FUNCTIONS else set()


def _argument(node: fx.Node, name: str) -> Any:
    """The second argument of a call, by position or by name."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get(name)


def _as_set(values: Any) -> set[Any]:
    return set(values) if isinstance(values, tuple | list) else set() if values is None else {values}
