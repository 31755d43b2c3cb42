"""The graph of a network on quantized tensors, written as one of float layers with a `FixedQuantize` behind each rounded value.

The network is run once. Where a node gives a quantized tensor, its scale, zero point and type are known from the tensor: the same
operator on floats, then a rounding to that grid, is what the node computes. Nothing else about the node needs to be known.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.errors import ModelError
from torchopt.from_torch_ao.layers import chain, filled, linear
from torchopt.from_torch_ao.operators import MOVES, float_of
from torchopt.quantize import FixedQuantize

ENDS = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
Grids = dict[str, float]


@dataclass(frozen=True)
class Grid:
    """scale, zero point and type of a quantized tensor."""

    scale: float
    zero_point: int
    dtype: torch.dtype


def rewritten(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[fx.GraphModule, Grids]:
    """Return the float network with roundings, and for each of its nodes that stands for a node of `graph` the step of its grid.

    Args:
        graph: a network that runs on quantized tensors; its nodes keep their names.
        inputs: the tensors of one call.

    Raises:
        ModelError: an operator or a type has no form here.
    """
    values = Values(graph)
    try:
        values.run(*inputs)
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"from_torch_ao: torch.ao's own network does not run on example_inputs: {reason}") from error
    return _Rewriting(graph, values.seen).result()


class Values(fx.Interpreter):
    """Runs a graph, and keeps what each node gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what it gave is kept apart, since the next may write into it (`ReLU6(inplace=True)`)."""
        value = super().run_node(n)
        self.seen[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


class _Rewriting:
    """One pass over their nodes; `of` says which of our nodes gives what one of theirs gave."""

    def __init__(self, graph: fx.GraphModule, seen: dict[str, Any]) -> None:
        self.theirs, self.seen = graph, seen
        self.root, self.graph = nn.Module(), fx.Graph()
        self.of: dict[fx.Node, fx.Node] = {}
        self.steps: Grids = {}
        self.holder = fx.GraphModule(self.root, fx.Graph())

    def result(self) -> tuple[fx.GraphModule, Grids]:
        for node in self.theirs.graph.nodes:
            self._node(node)
        whole = fx.GraphModule(self.holder, self.graph)
        whole.graph.eliminate_dead_code()
        ours = fx.GraphModule(whole, whole.graph, "Quantized")  # which takes only what the graph still names
        ours.graph.lint()
        names = {node.name for node in ours.graph.nodes}
        return ours.eval(), {name: step for name, step in self.steps.items() if name in names}

    def _node(self, node: fx.Node) -> None:
        made: fx.Node | None
        if node.op in ("placeholder", "output"):
            made = self.graph.node_copy(node, self._mapped)
        elif node.op == "get_attr":
            made = self._attribute(node)
        elif node.op == "call_module":
            made = self._module(node)
        else:
            made = self._function(node)
        if made is not None:
            self.of[node] = self._rounded(node, made)

    def _mapped(self, node: fx.Node) -> fx.Node:
        if node not in self.of:
            raise ModelError(
                f"from_torch_ao: {node.name} is read by a node that has no form here; quantize the float network instead"
            )
        return self.of[node]

    def _args(self, value: Any) -> Any:
        return fx.map_arg(value, self._mapped)

    def _attribute(self, node: fx.Node) -> fx.Node | None:
        """Scales and zero points are not needed, nor are packed weights; other tensors are."""
        value = self.seen[node.name]
        if not isinstance(value, torch.Tensor) or value.is_quantized:
            return None
        return self._buffer(node, value)

    def _buffer(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        name = str(node.target).replace(".", "_") if node.op == "get_attr" else node.name
        self.holder.register_buffer(name, value.detach().clone())
        return self.graph.create_node("get_attr", name, name=node.name)

    def _module(self, node: fx.Node) -> fx.Node:
        path = str(node.target)
        module = self.theirs.get_submodule(path)
        parts = chain(path, module)
        if len(parts) == 1 and parts[0] is module:  # torch's own: with all its arguments
            self.holder.add_submodule(path, module)
            return self.graph.create_node("call_module", path, self._args(node.args), self._args(node.kwargs), name=node.name)
        made: fx.Node = self._args(node.args[0])
        for number, part in enumerate(parts):
            made = self._called(part, path if number == 0 else f"{path}_{number}", made)
        return made

    def _called(self, layer: nn.Module, path: str, value: Any) -> fx.Node:
        if isinstance(layer, nn.ReLU):
            return self.graph.call_function(torch.relu, (value,))
        self.holder.add_submodule(path, layer)
        return self.graph.call_module(path, (value,))

    def _function(self, node: fx.Node) -> fx.Node | None:
        name = _name(node)
        if name in ("quantize_per_tensor", "dequantize", "quantize_per_channel"):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            value = self.seen[node.name]
            if source not in self.of or name == "quantize_per_channel":
                return None if value.is_quantized else self._buffer(node, value)
            return self.of[source]
        if _is_quantized_operator(node):
            return self._quantized(node, name)
        if (layer := self._functional_layer(node)) is not None:
            return layer
        return self.graph.create_node(node.op, node.target, self._args(node.args), self._args(node.kwargs), name=node.name)

    def _quantized(self, node: fx.Node, name: str) -> fx.Node:
        """An operator of `torch.ops.quantized`."""
        base = name.split(".")[0]
        if base.removesuffix("_relu") in ("linear", "conv1d", "conv2d", "conv3d", "linear_dynamic"):
            return self._packed(node, base)
        found = float_of(name)
        if found is None:
            raise ModelError(
                f"from_torch_ao: {node.name} calls quantized::{name}, which has no form here; leave it out of the qconfig"
            )
        function, count, relu = found
        made = self.graph.call_function(function, self._args(tuple(node.args[:count])), self._without_grid(node))
        return self.graph.call_function(torch.relu, (made,)) if relu else made

    def _without_grid(self, node: fx.Node) -> dict[str, Any]:
        return {
            k: v for k, v in self._args(dict(node.kwargs)).items() if k.removeprefix("output_") not in ("scale", "zero_point")
        }

    def _packed(self, node: fx.Node, base: str) -> fx.Node:
        """A function on packed parameters."""
        packed = self.seen[str(node.args[1])]
        weight, bias = packed.unpack()
        name = node.name
        if base.startswith("linear"):
            layer = linear(name, weight, bias)
        else:
            layer = _convolved(name, weight, bias, packed.stride(), packed.padding(), packed.dilation(), packed.groups())
        made = self._called(layer, name, self._mapped(node.args[0]))  # type: ignore[arg-type]
        return self.graph.call_function(torch.relu, (made,)) if base.endswith("_relu") else made

    def _functional_layer(self, node: fx.Node) -> fx.Node | None:
        """`F.linear` and `F.conv2d` on a weight that was quantized before: a layer."""
        name = _name(node)
        if name not in ("linear", "conv1d", "conv2d", "conv3d") or node.op != "call_function":
            return None
        given = _arguments(node)
        weight = self._quantized_source(given.get("weight"))
        if weight is None:
            return None
        bias = given.get("bias")
        bias = self.seen[bias.name] if isinstance(bias, fx.Node) else bias
        if name == "linear":
            layer = linear(node.name, weight, bias)
        else:
            rank = weight.dim() - 2
            stride, padding, dilation = (
                _each(given.get(k, d), rank) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))
            )
            layer = _convolved(node.name, weight, bias, stride, padding, dilation, given.get("groups", 1))
        return self._called(layer, node.name, self._mapped(given["input"]))

    def _quantized_source(self, node: Any) -> torch.Tensor | None:
        while isinstance(node, fx.Node):
            value = self.seen[node.name]
            if isinstance(value, torch.Tensor) and value.is_quantized:
                return value if node not in self.of else None
            if _name(node) != "dequantize":
                return None
            node = node.args[0]
        return None

    def _rounded(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """A rounding behind `made`, where the node gave a quantized tensor; what only moves values keeps their grid."""
        value = self.seen.get(node.name)
        if not isinstance(value, torch.Tensor) or not value.is_quantized or node.op == "placeholder":
            if isinstance(value, torch.Tensor) and value.is_floating_point() and node.op.startswith("call"):
                self.steps.setdefault(made.name, 0.0)
            return made
        if value.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric) or value.dtype not in ENDS:
            raise ModelError(
                f"from_torch_ao: {node.name} is {value.dtype}, {value.qscheme()}; integer kernels take activations in quint8 or qint8 "
                "with one scale"
            )
        if _name(node) in MOVES or self._kind(node) in MOVES:
            return made
        name = f"round_{node.name}"
        fixed = FixedQuantize(torch.tensor(value.q_scale()), torch.tensor(value.q_zero_point()), *ENDS[value.dtype])
        self.holder.add_submodule(name, fixed)
        rounded = self.graph.call_module(name, (made,))
        self.steps[rounded.name] = float(value.q_scale())
        return rounded

    def _kind(self, node: fx.Node) -> str:
        return type(self.theirs.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""


def _convolved(
    name: str, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> nn.Module:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
    rank = weight.dim() - 2
    fields: dict[str, Any] = {
        "stride": tuple(stride)[-rank:],
        "padding": padding if isinstance(padding, str) else tuple(padding)[-rank:],
    }
    fields |= {"dilation": tuple(dilation)[-rank:], "groups": groups}
    layer = kind(weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), **fields)
    if bias is None:
        layer.bias = None
    return filled(name, layer, weight, bias)


def _each(value: Any, rank: int) -> Any:
    return value if isinstance(value, str) else (value,) * rank if isinstance(value, int) else tuple(value)


def _arguments(node: fx.Node) -> dict[str, Any]:
    function = getattr(F, _name(node))
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # built in
        names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return ""


def _is_quantized_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and str(getattr(node.target, "__module__", "")).endswith("ops.quantized")
