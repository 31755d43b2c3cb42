"""Why a layer does not run as integers: the first condition of ONNX Runtime's that does not hold, told from what the file says.

The conditions are those of the selectors that make integer kernels of DequantizeLinear → layer → QuantizeLinear
(onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc): quantized weight, input, bias and output, 8 bits each.
"""

from __future__ import annotations

import onnx_ir as ir

from torchopt.onnx_file.view import View, weight_inputs
from torchopt.runtime.found import Found
from torchopt.runtime.kernels import Kernel

NO_KERNEL = "ONNX Runtime has no integer kernel for this form"
GONE = "is not in the graph that ONNX Runtime runs: computed at load, the same as another, or needed by no output"
WITH_KERNEL = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}  # kinds that have an integer form
SIXTEEN = {ir.DataType.UINT16, ir.DataType.INT16}
FLOATS = {
    ir.DataType.FLOAT: "float",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}
SAME_VALUES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Pad", "Slice")


def reason(layer: Found, kernels: list[Kernel], view: View) -> str:
    """Return why a layer has no integer kernel.

    Args:
        layer: of the file.
        kernels: what it became.
        view: of the file.
    """
    node, weight = layer.node, layer.weight
    if weight is None:
        return "its weight is computed at each inference"
    if not kernels:
        return GONE
    if (bits := next((kernel.bits for kernel in kernels if kernel.kind == "MatMulNBits"), None)) is not None:
        return f"its {bits}-bit weights become floats in the kernel (weights only)"
    if layer.computed:
        return f"its weight is computed in float from {weight.name}, at load"
    value = next(
        (node.inputs[i] for i in weight_inputs(node) if i < len(node.inputs) and weight in view.behind(node.inputs[i])), None
    )
    if weight.dtype is None or weight.dtype in FLOATS:
        tied = any(user.op_type == "Gather" and index == 0 for user, index in weight.readers)
        also = ", and that of an embedding, which reads it too" if tied else ""
        return f"its weight is {FLOATS.get(weight.dtype, 'float') if weight.dtype is not None else 'float'}{also}"
    return _of_form(node, value, decoded=layer.decoded)


def _of_form(node: ir.Node, weight: ir.Value | None, *, decoded: bool) -> str:
    """Where the weight is integers: what else is missing."""
    activation = _behind_clip(next((v for v in node.inputs if v is not weight), None))
    if not _dequantized(activation):
        return "its integers become floats at load (weights only)" if decoded else "its input is not quantized"
    producer = activation.producer() if activation is not None else None
    dtype = _rounded_to(producer.inputs[0] if producer is not None else None)
    if dtype in SIXTEEN:
        return "its activations have 16 bits, for which ONNX Runtime has no integer kernel"
    if node.op_type not in WITH_KERNEL:
        return NO_KERNEL
    bits = _bits(weight)
    if bits is not None and bits != 8:
        return f"its weights have {bits} bits in the graph, for which ONNX Runtime has no kernel with rounded inputs"
    users = [user for user, _ in node.outputs[0].uses()]
    if node.op_type != "MatMul" and not (users and all(_reaches_quantize(user) for user in users)):
        return "its output is not quantized"
    bias = node.inputs[2] if len(node.inputs) > 2 and "Conv" in node.op_type else None
    if bias is not None and not _dequantized(bias):
        return "its bias is float"
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


def _bits(weight: ir.Value | None) -> int | None:
    """The bits of the integers that a DequantizeLinear reads."""
    node = _decoder(weight)
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return codes.dtype.bitwidth if codes is not None and codes.dtype is not None else None


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _decoder(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in SAME_VALUES:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def _reaches_quantize(node: ir.Node) -> bool:
    if node.op_type in ("Relu", "Clip"):
        users = [user for user, _ in node.outputs[0].uses()]  # none where it is an output of the network
        return bool(users) and all(_reaches_quantize(user) for user in users)
    return node.op_type == "QuantizeLinear"
