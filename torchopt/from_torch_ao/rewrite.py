"""The graph of a network on quantized tensors, written as one of float layers with a `FixedQuantize` behind each rounded value.

The network is run once. Where a node gives a quantized tensor, its scale, zero point and type are known from the tensor: the same
operator on floats, then a rounding to that grid, is what the node computes. Nothing else about the node needs to be known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.errors import ModelError
from torchopt.from_torch_ao.layers import chain, layer_of
from torchopt.from_torch_ao.operators import MOVES, float_of
from torchopt.network.core_layer import CONV
from torchopt.quantize import FixedQuantize

DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}
ENDS = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
Steps = dict[str, float]


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


def rewritten(graph: fx.GraphModule, seen: Mapping[str, Any]) -> tuple[fx.GraphModule, Steps]:
    """Return the float network with roundings, and for each of its nodes that stands for a node of `graph` the step of its grid.

    Args:
        graph: a network that runs on quantized tensors; its nodes keep their names.
        seen: what each of its nodes gives (`Values`).

    Raises:
        ModelError: an operator or a type has no form here.
    """
    return _Rewriting(graph, seen).result()


class _Rewriting:
    """One pass over their nodes; `of` says which of our nodes gives what one of theirs gave."""

    def __init__(self, graph: fx.GraphModule, seen: Mapping[str, Any]) -> None:
        self.theirs, self.seen = graph, seen
        self.holder, self.graph = fx.GraphModule(nn.Module(), fx.Graph()), fx.Graph()
        self.of: dict[fx.Node, fx.Node] = {}
        self.constants: set[fx.Node] = set()  # what no input of the network takes part in
        self.steps: Steps = {}

    def result(self) -> tuple[fx.GraphModule, Steps]:
        for node in self.theirs.graph.nodes:
            self._node(node)
        whole = fx.GraphModule(self.holder, self.graph)
        whole.graph.eliminate_dead_code()
        ours = fx.GraphModule(whole, whole.graph, "Quantized")  # which takes only what the graph still names
        ours.graph.lint()
        names = {node.name for node in ours.graph.nodes}
        return ours.eval(), {name: step for name, step in self.steps.items() if name in names}

    def _node(self, node: fx.Node) -> None:
        if node.op in ("get_attr", "call_function", "call_method") and self.constants.issuperset(node.all_input_nodes):
            self.constants.add(node)
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
            if source in self.constants:  # a weight, which a layer takes from the quantized tensor
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
        if base == "dropout":  # in evaluation: nothing
            return self._mapped(node.args[0])  # type: ignore[arg-type]
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
        given: dict[str, Any] = {"input": node.args[0], "bias": bias}
        if not base.startswith("linear"):
            given |= {field: getattr(packed, field)() for field in CONV}
        made = self._on_weight(node, weight, given)
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
        return self._on_weight(node, weight, given)

    def _on_weight(self, node: fx.Node, weight: torch.Tensor, given: Mapping[str, Any]) -> fx.Node:
        """A layer of torch on a quantized weight, called where a function was."""
        rank, bias = weight.dim() - 2, given.get("bias")
        bias = self.seen[bias.name] if isinstance(bias, fx.Node) else bias
        kind = f"Conv{rank}d" if rank else "Linear"
        fields = {field: _each(given.get(field, default), rank) for field, default in DEFAULTS.items()} if rank else {}
        fields |= {"groups": given.get("groups", 1)} if rank else {}
        return self._called(layer_of(node.name, kind, weight, bias, fields), node.name, self._mapped(given["input"]))

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


def _each(value: Any, rank: int) -> Any:
    return value if isinstance(value, str) else (value,) * rank if isinstance(value, int) else tuple(value)[-rank:]


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
