"""What ONNX Runtime really runs: which layers are integer kernels, which stayed float and why, what packing left to run.

The session writes the graph that it optimized to a temporary file; its node types are the truth. A layer is found there again by
its output's name, which ORT keeps through fusion or passes on to the node that it fused with.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from torchopt.export.decoders import DOMAIN
from torchopt.export.read import read
from torchopt.runtime.session import session

LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
INTEGER = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "MatMulNBits",
    "QAttention",
}
FLOAT = LAYERS | {"FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul"}
WRITTEN = {
    "DequantizeLinear",
    "Transpose",
    "Reshape",
    "Cast",
    "Identity",
    "QuantizeLinear",
    "Pad",
    "Slice",
}  # between a constant and a layer
FINISHES = {
    "QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "Cast", "Mul", "Add", "BatchNormalization", "LeakyRelu", "Sigmoid", "HardSigmoid",
    "HardSwish", "Tanh", "Gelu", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
}  # fmt: skip
NO_KERNEL = "ONNX Runtime has no integer kernel for this form"
DECODING = {"BitwiseAnd", "CumSum", "ScatterElements", "GatherElements"}  # what packing alone brings into a graph


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or matrix product: its weight's name, its kernel in ORT, whether that is integer, and why not."""

    name: str
    kernel: str
    integer: bool
    reason: str
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each layer of a file runs.

    Attributes:
        layers: a row a convolution or matrix product with a constant weight.
        kernels: how often each node type occurs in the optimized graph.
        undecoded: node types of packed weights that run at each inference (none where the runtime folds them).
    """

    layers: list[Layer]
    kernels: dict[str, int]
    undecoded: list[str]

    @property
    def integer(self) -> list[str]:
        """Names of the layers that run as integers."""
        return [layer.name for layer in self.layers if layer.integer]

    @property
    def float(self) -> list[str]:
        """Names of the layers that run in float."""
        return [layer.name for layer in self.layers if not layer.integer]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"integer": self.integer, "float": self.float, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{len(self.integer)} of {len(self.layers)} layers run as integers in ONNX Runtime"]
        lines += [f"  float: {layer.name} ({layer.kernel}): {layer.reason}" for layer in self.layers if not layer.integer]
        if self.undecoded:
            lines.append(f"  packed weights are decoded at each inference: {', '.join(self.undecoded)}")
        lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.kernels.items(), key=lambda x: -x[1])))
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Placement:
    """Open the file in ONNX Runtime and report how its layers run.

    Raises:
        FileError: the file is missing, damaged, or refused.
    """
    model = read(path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        session(path, optimized_to=target)
        optimized = onnx.load(target)
    kernels = Counter(node.op_type for node in optimized.graph.node)
    producers = {output: node for node in optimized.graph.node for output in node.output}
    found = _layers(model)
    layers = [_layer(node, weight, producers, model) for node, weight in found]
    convolutions = {str(weight.name) for node, weight in found if "Conv" in node.op_type}
    products = sum(node.op_type == "MatMul" for node in model.graph) - sum(node.op_type == "MatMul" for node, _ in found)
    packed = any(node.domain == DOMAIN for node in model.graph)
    undecoded = sorted(DECODING & set(kernels)) if packed else []
    return Placement(layers=_dealt(layers, convolutions, kernels, products), kernels=dict(kernels), undecoded=undecoded)


def _layers(model: ir.Model) -> list[tuple[ir.Node, ir.Value]]:
    """The layers of the file with the value that names their weight."""
    found = []
    for node in model.graph:
        if node.op_type in LAYERS and node.domain in ("", "ai.onnx"):
            weight = next((w for w in map(_constant, node.inputs[1::-1]) if w is not None), None)
            if weight is not None:
                found.append((node, weight))
        elif node.op_type in INTEGER:
            weight = next((w for w in map(_constant, node.inputs[1:]) if w is not None and _is_matrix(w)), None)
            if weight is not None:
                found.append((node, weight))
    return found


def _constant(value: ir.Value | None) -> ir.Value | None:
    """The initializer or packed weight behind a value, through DequantizeLinear, Transpose and Reshape; None for activations."""
    while value is not None:
        node = value.producer()
        if node is None:
            return value if value.is_initializer() else None
        if node.domain == DOMAIN:
            return value
        if node.op_type not in WRITTEN and not _scales(node):
            return None
        value = node.inputs[0]
    return None


def _scales(node: ir.Node) -> bool:
    """True for the Mul of integers that were cast to floats with their scale."""
    source = node.inputs[0].producer() if node.op_type == "Mul" and node.inputs[0] is not None else None
    return source is not None and source.op_type == "Cast"


def _is_matrix(value: ir.Value) -> bool:
    """True for a weight, which scales and zero points are not; the shape of a packed one is not in the file."""
    return value.shape is None or len(value.shape) > 1


def _layer(node: ir.Node, weight: ir.Value, producers: Mapping[str, onnx.NodeProto], model: ir.Model) -> Layer:
    kernel = _kernel(node, producers)
    integer = kernel in INTEGER
    return Layer(
        name=str(weight.name),
        kernel=kernel,
        integer=integer,
        reason="" if integer else _reason(node),
        weight_bytes=_stored_bytes(weight),
    )


def _kernel(node: ir.Node, producers: Mapping[str, onnx.NodeProto]) -> str:
    """The type of the optimized node that computes the layer: its own output's producer, or that of a node which absorbed it."""
    value, seen = node.outputs[0], 0
    while value is not None and seen < 8:
        found = producers.get(str(value.name))
        if found is not None and found.op_type in INTEGER | FLOAT:
            return found.op_type
        users = [user for user, _ in value.uses()]
        if not users:
            break
        if users[0].op_type not in FINISHES:
            break  # what comes out there is not this layer's
        value, seen = users[0].outputs[0], seen + 1
    return ""


def _dealt(layers: list[Layer], convolutions: set[str], kernels: Mapping[str, int], products: int) -> list[Layer]:
    """Layers whose fused node has another name are dealt the kernels of their kind that are left over.

    Those that cannot be integers come first, and take float kernels; of the others, integer ones only if no float is left.

    Args:
        layers: a row a layer, some without a kernel.
        convolutions: the names of those that are convolutions.
        kernels: how often each node type occurs.
        products: how many matrix products of the file have no constant operand, such as those of attention: they are no layers.
    """
    left = Counter({k: n for k, n in kernels.items() if k in INTEGER | FLOAT})
    left.subtract(layer.kernel for layer in layers if layer.kernel)
    for kind in ("FusedMatMul", "MatMul", "QLinearMatMul"):
        taken = min(products, max(0, left[kind]))
        left[kind] -= taken
        products -= taken
    spare = sorted((k for k, n in left.items() for _ in range(max(0, n))), key=lambda k: k in INTEGER)
    dealt = {id(layer): layer for layer in layers}
    for layer in sorted((x for x in layers if not x.kernel), key=lambda x: x.reason == NO_KERNEL):
        kernel = next((k for k in spare if ("Conv" in k) is (layer.name in convolutions)), "?")
        if kernel in spare:
            spare.remove(kernel)
        integer = kernel in INTEGER
        dealt[id(layer)] = replace(layer, kernel=kernel, integer=integer, reason="" if integer else layer.reason)
    return list(dealt.values())


def _reason(node: ir.Node) -> str:
    """Why ORT could not fuse the layer: the first condition of its selectors that does not hold."""
    activation, weight = _behind_clip(node.inputs[0]), node.inputs[1]
    decoded = _decoded(weight)
    if not (decoded or _dequantized(weight)):
        return "its weight is float"
    if not _dequantized(activation):
        return "its integers become floats at load (weights only)" if decoded else "its input is not quantized"
    codes = activation.producer().inputs[0] if activation is not None and activation.producer() is not None else None  # type: ignore[union-attr]
    dtype = _rounded_to(codes)
    if dtype in (ir.DataType.UINT16, ir.DataType.INT16):
        return "its activations have 16 bits, for which ONNX Runtime has no integer kernel"
    users = [user for user, _ in node.outputs[0].uses()]
    if node.op_type != "MatMul" and not all(_reaches_quantize(user) for user in users):
        return "its output is not quantized"
    if dtype == ir.DataType.INT8:
        return "its activations are int8, which the x86 kernels take only after a conversion; quantize to uint8"
    return NO_KERNEL


def _behind_clip(value: ir.Value | None) -> ir.Value | None:
    """What a Clip reads that only keeps a layer in float, or the value itself."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Clip" and _dequantized(node.inputs[0]) else value


def _rounded_to(codes: ir.Value | None) -> ir.DataType | None:
    """The type of an activation's integers: that of the zero point, since files do not record types between nodes."""
    node = codes.producer() if codes is not None else None
    while node is not None and node.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear"):
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    zero = node.inputs[2] if node is not None and len(node.inputs) > 2 else None
    return zero.dtype if zero is not None else None


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _decoded(value: ir.Value | None) -> bool:
    """True for integers that a Cast and a Mul turn into floats, transposed or not."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and _scales(node)


def _reaches_quantize(node: ir.Node) -> bool:
    if node.op_type in ("Relu", "Clip"):
        return all(_reaches_quantize(user) for user, _ in node.outputs[0].uses())
    return node.op_type == "QuantizeLinear"


def _stored_bytes(weight: ir.Value) -> int:
    """Bytes in the file: of the initializer, or of everything that the decoding call reads."""
    node = weight.producer()
    parts = [weight] if node is None else [v for v in node.inputs if v is not None]
    return sum(v.const_value.nbytes for v in parts if v.const_value is not None)
