"""One view of a model that anyone may have made: every constant, every node and every layer, in whatever scope they stand.

An ONNX file has weights in more places than the main graph's initializers: in Constant nodes, in the branches of an If, in the bodies
of a Loop or a Scan, in functions, as operands that are handed to a function, in files that ONNX Runtime has optimized under operators
of its own. Whoever looks only at the main graph says "no weights" of such a file. So all who look at a stranger's model look at this:

    view = View(read(path))           # packed weights are constants too, of origin "packed"; after unpack_model they are dense ones
    for scope, node in view.nodes:    # every node once; a function's body is a scope of its own, however often it is called
    for constant in view.constants:   # every tensor that the file holds as such, with the nodes that read it
    for layer in view.layers:         # every convolution, matrix product and recurrent layer whose weight is a constant
    view.behind(value)                # the constants that a value is a rewriting of (through DequantizeLinear, Cast, Transpose, …)

Scopes that the decoders of packed weights make are left out: they are no part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from torchopt.codecs.encoding import DOMAIN
from torchopt.onnx_file.packed_call import bytes_of_call, gives_weight

STANDARD = {"", "ai.onnx"}
RUNTIMES = {
    "com.microsoft",
    "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
}  # what ONNX Runtime writes when it has optimized a file
WEIGHTS: dict[str, tuple[int, ...]] = {  # kind of layer → the inputs that may be its weights; by name, since the domains agree
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "DeformConv"), (1,)),
    **dict.fromkeys(("FusedConv", "NhwcConv", "NhwcFusedConv", "ConvTransposeWithDynamicPads"), (1,)),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger", "FusedGemm", "FusedMatMul", "FusedMatMulActivation"), (1, 0)),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4"), (1,)),
    **dict.fromkeys(("GemmFastGelu", "GemmFloat8", "TransposeMatMul", "SparseToDenseMatMul", "MatMulInteger16"), (1, 0)),
    **dict.fromkeys(("QLinearConv", "QLinearConvTranspose", "QGemm"), (3,)),
    "QLinearMatMul": (3, 0),
    **dict.fromkeys(("Attention", "QAttention"), (1,)),  # of com.microsoft; the standard Attention has no weight
    "Einsum": (1, 0, 2),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM", "AttnLSTM"), (1, 2)),
}
BOTH = {
    "LSTM",
    "GRU",
    "RNN",
    "DynamicQuantizeLSTM",
    "AttnLSTM",
}  # whose inputs above are weights together; else the first that is one
REWRITES = {  # what may stand between a constant and the layer that it is the weight of: only the form changes
    "Cast", "CastLike", "DequantizeLinear", "DequantizeBFP", "Flatten", "Identity", "Pad", "QuantizeLinear", "ReorderInput", "Reshape",
    "Slice", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """A graph, a subgraph of a node, or a function.

    Attributes:
        name: "" of the main graph; else as "y/then_branch" (by the node's name, or that of its first output) or "domain::function".
        body: what holds its nodes.
        root: the main graph, or the function that it lies in.
        outer: the scope that it lies in directly; None of a root.
    """

    name: str
    body: ir.Graph | ir.Function
    root: ir.Graph | ir.Function
    outer: Scope | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Constant:
    """A tensor that the file holds as such.

    Attributes:
        name: of the value that nodes read.
        scope: where it stands.
        value: that value; for a packed weight, what its decoding gives.
        origin: "initializer", "constant" (a Constant node), or "packed" (a call of a decoder of ours).
        tensor: the tensor; None where it is packed.
        readers: the nodes that read it, with the number of the input; those in functions that it is handed to, too.
    """

    name: str
    scope: Scope
    value: ir.Value
    origin: Literal["initializer", "constant", "packed"]
    tensor: ir.TensorProtocol | None
    readers: list[tuple[ir.Node, int]]

    @property
    def replaceable(self) -> bool:
        """Whether a caller may give another tensor for it: it is an input of its graph too."""
        return self.value.is_graph_input()

    @property
    def dtype(self) -> ir.DataType | None:
        """The type of its elements; of a packed weight, of the values that its table holds."""
        if self.tensor is not None:
            return self.tensor.dtype
        node = self.value.producer()
        parts = [v.const_value for v in node.inputs if v is not None and v.const_value is not None] if node is not None else []
        return parts[-1].dtype if parts else self.value.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file; of a packed weight, of everything that its decoding reads, of shared codes its share."""
        node = self.value.producer()
        if self.tensor is not None or node is None:
            return 0 if self.tensor is None else self.tensor.nbytes
        return bytes_of_call(node)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A node that computes with constant weights: a convolution, a matrix product, or a recurrent layer.

    Attributes:
        node: the node.
        scope: where it stands.
        weights: its weights: one, two of a recurrent layer, several in a function that is called with different ones.
    """

    node: ir.Node
    scope: Scope
    weights: list[Constant] = field(default_factory=list)


class View:
    """All scopes, nodes, constants and layers of a model; see the file's first paragraph.

    Args:
        model: as `read` gives it. What is changed in it later is not seen.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]> g (float[1, 2] x, bool flag) => (y) {
        ...     y = If (flag) <then_branch = a () => (p) {w = Constant <value = float[2, 1] {1.0, 2.0}> ()  p = MatMul (x, w)},
        ...                    else_branch = b () => (q) {q = Identity (x)}>
        ... }''')
        >>> [(layer.node.op_type, layer.scope.name, layer.weights[0].name) for layer in View(model).layers]
        [('MatMul', 'y/then_branch', 'w')]
    """

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self.scopes = list(scopes_of(model))
        self.nodes = [(scope, node) for scope in self.scopes for node in scope.body]
        self._handed = self._values_handed_in()
        self.constants = [constant for scope in self.scopes for constant in self._constants(scope)]
        self._known = {id(constant.value): constant for constant in self.constants}
        self.layers = list(self._layers())

    def behind(self, value: ir.Value | None) -> list[Constant]:
        """Return the constants that a value is a rewriting of: none for an activation, several for a parameter of a function."""
        found: dict[int, Constant] = {}
        waiting, seen = [value], set[int]()
        for current in waiting:  # it grows
            if current is None or id(current) in seen:
                continue
            seen.add(id(current))
            node = current.producer()
            if id(current) in self._known:
                found.setdefault(id(current), self._known[id(current)])
            elif node is None:
                waiting += self._handed.get(id(current), [])
            elif node.op_type in REWRITES or _scales(node):
                waiting.append(next(iter(node.inputs), None))
        return list(found.values())

    def readers(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """Return the nodes that read a value, with the number of the input, also those in functions that it is handed to."""
        found, waiting, seen = [], [value], set[int]()
        for current in waiting:  # it grows
            if id(current) in seen:
                continue
            seen.add(id(current))
            for node, index in current.uses():
                function = self._functions.get(node.op_identifier())
                if function is None or node.domain == DOMAIN:
                    found.append((node, index))
                elif index < len(function.inputs):
                    waiting.append(function.inputs[index])
        return found

    def _values_handed_in(self) -> dict[int, list[ir.Value | None]]:
        """What the calls of a function hand to each of its parameters, by the parameter's identity."""
        handed: dict[int, list[ir.Value | None]] = {}
        for _, node in self.nodes:
            function = self._functions.get(node.op_identifier()) if node.domain != DOMAIN else None
            for parameter, value in zip(function.inputs if function is not None else (), node.inputs, strict=False):
                handed.setdefault(id(parameter), []).append(value)
        return handed

    def _constants(self, scope: Scope) -> Iterator[Constant]:
        initializers = scope.body.initializers if isinstance(scope.body, ir.Graph) else {}
        for name, value in initializers.items():
            if value.const_value is not None and not any(node.domain == DOMAIN for node, _ in value.uses()):
                yield self._constant(scope, str(name), value, "initializer", value.const_value)
        for node in scope.body:
            if gives_weight(node):
                yield self._constant(scope, str(node.outputs[0].name), node.outputs[0], "packed", None)
            elif (tensor := constant_of(node)) is not None:
                yield self._constant(scope, str(node.outputs[0].name), node.outputs[0], "constant", tensor)

    def _constant(
        self,
        scope: Scope,
        name: str,
        value: ir.Value,
        origin: Literal["initializer", "constant", "packed"],
        tensor: ir.TensorProtocol | None,
    ) -> Constant:
        readers = self.readers(value)
        return Constant(name=name, scope=scope, value=value, origin=origin, tensor=tensor, readers=readers)

    def _layers(self) -> Iterator[Layer]:
        for scope, node in self.nodes:
            found = [self.behind(_input(node, index)) for index in weight_inputs(node)]
            if node.op_type not in BOTH:
                found = [group for group in found if group][:1]
            weights = [constant for group in found for constant in group]
            if weights:
                yield Layer(node=node, scope=scope, weights=weights)


def weight_inputs(node: ir.Node) -> tuple[int, ...]:
    """Return the numbers of the inputs that may be a layer's weights, the likeliest first; none for other nodes."""
    if node.domain not in STANDARD | RUNTIMES or (node.op_type == "Attention" and node.domain in STANDARD):
        return ()
    return WEIGHTS.get(node.op_type, ())


def constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the tensor of a Constant node, in whichever of its attributes it stands; None for other nodes and for strings."""
    if node.op_type != "Constant" or node.domain not in STANDARD or len(node.outputs) != 1:
        return None
    attribute = next((a for a in node.attributes.values() if not a.is_ref()), None)
    if attribute is None:
        return None
    kinds = ir.AttributeType
    if attribute.type == kinds.TENSOR:
        return attribute.as_tensor()
    if attribute.type in (kinds.FLOAT, kinds.FLOATS):
        return ir.tensor(np.array(attribute.value, np.float32))
    return ir.tensor(np.array(attribute.value, np.int64)) if attribute.type in (kinds.INT, kinds.INTS) else None


def scopes_of(model: ir.Model) -> Iterator[Scope]:
    """Yield the main graph, then what lies in it, then each function and what lies in it; decoders of packed weights are left out."""
    roots = [Scope(name="", body=model.graph, root=model.graph)]
    roots += [Scope(name=f"{f.domain}::{f.name}", body=f, root=f) for f in model.functions.values() if f.domain != DOMAIN]
    while roots:
        scope = roots.pop(0)
        yield scope
        inner = []
        for node in scope.body:
            name = node.name or next((str(value.name) for value in node.outputs if value.name), node.op_type)
            for attribute in node.attributes.values():
                graphs = _graphs(attribute)
                for number, graph in enumerate(graphs):
                    own = f"{name}/{attribute.name}" + (f"[{number}]" if len(graphs) > 1 else "")
                    inner.append(
                        Scope(name=f"{scope.name}/{own}" if scope.name else own, body=graph, root=scope.root, outer=scope)
                    )
        roots = inner + roots


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _scales(node: ir.Node) -> bool:
    """True for the Mul of integers that were cast to floats with their scale, which is a constant."""
    if node.op_type != "Mul" or len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[1] is None:
        return False
    source, scale = node.inputs[0].producer(), node.inputs[1].producer()
    if scale is not None and scale.op_type == "Cast" and scale.inputs:
        fixed = scale.inputs[0] is not None and scale.inputs[0].const_value is not None
    else:
        fixed = node.inputs[1].const_value is not None or (scale is not None and scale.op_type == "Constant")
    return fixed and source is not None and source.op_type in ("Cast", "Reshape")
