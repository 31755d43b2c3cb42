"""Where activations are rounded, so that ONNX Runtime fuses everything between two roundings to one integer kernel.

ORT fuses DequantizeLinear → op → QuantizeLinear. So the inputs and the output of each integer operation are rounded:

    layer       its input, its output (after batch norm and activation); a last linear layer gives float logits
    change      sums, products, means, pools, activations: every input, and the output on a grid of its own
    share       max pools, moves, concatenations, slices, nearest pixels: the output lies on the grid of the inputs, one quantizer for all

A concatenation of values after a ReLU and of signed ones has a grid for each (ORT's QLinearConcat takes them): on a common grid, which
starts below 0, the ReLU would be left over and its layer float.

An operation other than a layer is integer only if all its inputs come from integer operations. A value that only a ReLU reads is not
rounded: the ReLU's output is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.network.surgery import module_of
from torchopt.quantize.config import Quantize
from torchopt.quantize.graph.dropout import regularizes
from torchopt.quantize.graph.earlier_activations import lift
from torchopt.quantize.graph.float_front import ENTRANCE
from torchopt.quantize.graph.fuse import activation_of, ends_of
from torchopt.quantize.graph.kernel_choice import is_integer_layer, match_kernels
from torchopt.quantize.graph.tracer import example
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.float_layers import FusedLinear
from torchopt.quantize.layers.learned import activation_quantizer
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.targets import Target

SHARE_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.ChannelShuffle,
    nn.UpsamplingNearest2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.CircularPad2d,
)
SHARE_FUNCTIONS = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.cat, torch.concat,
    torch.chunk, torch.split, torch.unbind, operator.getitem, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pixel_shuffle,
}  # fmt: skip
SHARE_METHODS = {
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind", "contiguous",
}  # fmt: skip
CONCATENATE = {torch.cat, torch.concat}
TUPLES = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
PASS_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
PASS_FUNCTIONS = {F.dropout, F.dropout2d}
UNIT = (nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid")
CHANGE_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.LeakyReLU, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish,
    nn.SiLU,
)  # fmt: skip
CHANGE_FUNCTIONS = {
    operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul, torch.mean, F.hardswish, F.hardsigmoid, F.silu,
    torch.sigmoid, F.sigmoid, F.leaky_relu, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_avg_pool1d,
}  # fmt: skip
CHANGE_METHODS = {"add", "add_", "mul", "mul_", "mean", "sigmoid"}


def place(traced: fx.GraphModule, assignment: dict[str, Quantize], target: Target) -> None:
    """Insert `ActivationQuantizer` modules into a traced and fused model, in place."""
    kinds = {node: _kind(traced, node) for node in traced.graph.nodes}
    kinds |= {node: "change" for node in kinds if node.target in CONCATENATE and len(_signs(traced, node, kinds)) > 1}
    integer = _integer(traced, kinds)
    groups = _Groups()
    for node in integer:
        if kinds[node] in ("share", "pass"):
            for source in _tensors(node):
                groups.join(node, source)
    made: dict[fx.Node, str] = {}
    fallback = next(iter(assignment.values()))
    for node in list(traced.graph.nodes):
        users = _users_to_round(traced, node, kinds, integer)
        if not users:
            continue
        root = groups.root(node)
        if root not in made:
            made[root] = f"quantizer_{len(made)}"
            config = _config(traced, node, users) or fallback
            unit = (0.0, 1.0) if _made_by(traced, node) in UNIT else None
            traced.add_module(made[root], activation_quantizer(config, target, unit))
        with traced.graph.inserting_after(node):
            rounded = traced.graph.call_module(made[root], (node,))
        for user in users:
            user.replace_input_with(node, rounded)
    _keep_integer_biases(traced)
    names = {node: _name_of_grid(traced, node) for node in traced.graph.nodes}
    grids = {node: name for node, name in names.items() if name is not None}
    match_kernels(traced, grids, {node for node, kind in kinds.items() if kind == "pass"})
    traced.graph.lint()
    traced.recompile()


def lift_activations(traced: fx.GraphModule, layers: set[str]) -> None:
    """Put activations behind moves before them, where one of the `layers`, or another operation on integers, absorbs them."""

    def moves(node: fx.Node) -> bool:
        one = node.target not in CONCATENATE | TUPLES and isinstance(example(node), torch.Tensor)
        return one and _kind(traced, node) == "share" and isinstance(example(node.all_input_nodes[0]), torch.Tensor)

    def absorbs(node: fx.Node) -> bool:
        norm = isinstance(module_of(traced, node), _BatchNorm)
        return norm or (node.op == "call_module" and node.target in layers) or _kind(traced, node) == "change"

    lift(traced, lambda node: activation_of(traced, node) is not None, moves, absorbs)


def _keep_integer_biases(traced: fx.GraphModule) -> None:
    """Tell each layer whose bias the runtime keeps as an integer (convolutions, products with rounded results) which grids it reads."""
    read: dict[Fused, set[ActivationQuantizer | None]] = {}
    for node in traced.graph.nodes:
        layer = module_of(traced, node)
        if isinstance(layer, Fused) and is_integer_layer(traced, node):
            name = _name_of_grid(traced, node.args[0])
            read.setdefault(layer, set()).add(None if name is None else traced.get_submodule(name))  # type: ignore[arg-type]
    for layer, grids in read.items():
        if None not in grids:
            layer.reads = tuple(grids)


def _name_of_grid(traced: fx.GraphModule, node: Any) -> str | None:
    """The quantizer that a value last went through; only what moves elements may stand between."""
    while isinstance(node, fx.Node):
        if isinstance(module_of(traced, node), ActivationQuantizer):
            return str(node.target)
        if _kind(traced, node) not in ("share", "pass") or node.target in CONCATENATE:
            return None
        node = node.args[0]
    return None


def _kind(traced: fx.GraphModule, node: fx.Node) -> str:
    """ "layer", "change", "share", "pass", or "" for what stays float."""
    if activation_of(traced, node) is not None:
        return "change"
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if regularizes(module):
            return "pass"
        for kind, classes in (("layer", Fused), ("share", SHARE_MODULES), ("pass", PASS_MODULES), ("change", CHANGE_MODULES)):
            if isinstance(module, classes):
                return kind
        if isinstance(module, nn.Upsample) and module.mode == "nearest":
            return "share"
    if node.op == "call_function":
        if node.target in PASS_FUNCTIONS:
            return "pass"
        if node.target is F.interpolate and _mode(node) == "nearest":
            return "share"
        if node.target is F.pad:
            return "" if len(node.args) > 3 or node.kwargs.get("value") else "share"
        return "share" if node.target in SHARE_FUNCTIONS else "change" if node.target in CHANGE_FUNCTIONS else ""
    if node.op == "call_method":
        return "share" if node.target in SHARE_METHODS else "change" if node.target in CHANGE_METHODS else ""
    return ""


def _mode(node: fx.Node) -> Any:
    """How an interpolation is asked to go about it."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest")


def _signs(traced: fx.GraphModule, node: fx.Node, kinds: dict[fx.Node, str]) -> set[bool]:
    """Whether the operations that make the values which `node` passes on end in a ReLU: one answer each."""
    found = set()
    for source in _tensors(node):
        module = module_of(traced, source)
        if kinds.get(source) in ("share", "pass"):
            found |= _signs(traced, source, kinds)
        else:
            act = module.act if isinstance(module, Fused) else activation_of(traced, source)
            found.add(act is not None and ends_of(act)[0] == 0)
    return found


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` takes its values from: the elements of a concatenation, else positional arguments."""
    first = node.args[0] if node.args else None
    if isinstance(first, list | tuple):
        return [a for a in first if isinstance(a, fx.Node)]
    operands = node.args[:2] if node.target in CHANGE_FUNCTIONS or node.target in CHANGE_METHODS else node.args[:1]
    return [a for a in operands if isinstance(a, fx.Node)]


def _integer(traced: fx.GraphModule, kinds: dict[fx.Node, str]) -> set[fx.Node]:
    """The operations that run on integers: layers, and others all of whose inputs come from integer operations."""
    found: set[fx.Node] = set()
    for node, kind in kinds.items():
        sources = _tensors(node)
        if kind == "layer" or node.meta.get(ENTRANCE) or (kind and sources and all(source in found for source in sources)):
            found.add(node)
    return found - _in_vain(traced, kinds, found)


def _in_vain(traced: fx.GraphModule, kinds: dict[fx.Node, str], integer: set[fx.Node]) -> set[fx.Node]:
    """What would run on integers between linear layers and float operations: an integer product gives floats at no cost."""
    floats: set[fx.Node] = set()  # linear layers, and what is computed from their results alone
    for node in kinds:
        if node in integer and (_is_linear(traced, node) or (kinds[node] != "layer" and floats.issuperset(_tensors(node)))):
            floats.add(node)
    vain: set[fx.Node] = set()
    for node in reversed(list(kinds)):
        if node in floats and kinds[node] != "layer" and not any(user in integer - vain for user in node.users):
            vain.add(node)
    return vain


def _is_linear(traced: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module_of(traced, node), FusedLinear)


def _users_to_round(traced: fx.GraphModule, node: fx.Node, kinds: dict[fx.Node, str], integer: set[fx.Node]) -> list[fx.Node]:
    """Who must read the value of `node` rounded: everybody where an integer operation made it, else the integer ones."""
    users = list(node.users)
    if node.op == "output" or not users or not _is_rounded(example(node)):
        return []
    if node not in integer:
        readers = [u for u in users if u in integer and kinds[u] in ("layer", "change") and not u.meta.get(ENTRANCE)]
        return [u for u in readers if node in _tensors(u)]
    if kinds[node] == "pass" or node.target in TUPLES:
        return []
    if len(users) == 1 and kinds[node] != "share" and activation_of(traced, users[0]) is not None:
        return []
    if _is_linear(traced, node) and not any(u in integer for u in users):
        return []
    return users


def _is_rounded(value: Any) -> bool:
    """False for several tensors at once (chunks, a pool with its indices), for indices and for sizes, as far as the example shows."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return not isinstance(value, tuple | list | int | float | bool | torch.dtype | torch.device)


def _made_by(traced: fx.GraphModule, node: fx.Node) -> Any:
    """The class of a module, a function, or the name of a method."""
    return type(traced.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _config(traced: fx.GraphModule, node: fx.Node, users: list[fx.Node]) -> Quantize | None:
    """The configuration of the layer that makes the value, or of one that reads it."""
    for candidate in (node, *users):
        if candidate.op == "call_module":
            module = traced.get_submodule(str(candidate.target))
            if isinstance(module, Fused):
                return module.config
    return None


class _Groups:
    """Disjoint sets of nodes whose values share one grid."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def root(self, node: fx.Node) -> fx.Node:
        """The representative of a node's set."""
        while node in self.parent:
            node = self.parent[node]
        return node

    def join(self, one: fx.Node, other: fx.Node) -> None:
        """Put the sets of two nodes together."""
        first, second = self.root(one), self.root(other)
        if first is not second:
            self.parent[first] = second
