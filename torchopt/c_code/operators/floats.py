"""What a network computes in float: layers that stayed float, softmax, arithmetic.

Sums may differ from ONNX Runtime's in their last bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from torchopt.c_code.lower import Lowering, Operator
from torchopt.c_code.operators.grids import before, windows
from torchopt.c_code.operators.integers import in_place, operands
from torchopt.c_code.program import Value

Numbers = list[tuple[str | None, float]]  # attributes with their defaults; without a name always the same
MAPS: dict[str, tuple[str, Numbers]] = {  # operator → the function in C, and its numbers
    "Relu": ("CLIP", [(None, 0.0), (None, math.inf)]),
    "LeakyRelu": ("LEAKY", [("alpha", 0.01), (None, 0.0)]),
    "Sigmoid": ("SIGMOID", []),
    "HardSigmoid": ("HARD_SIGMOID", [("alpha", 0.2), ("beta", 0.5)]),
    "HardSwish": ("HARD_SWISH", [(None, 1 / 6), (None, 0.5)]),
    "Tanh": ("TANH", []),
    "Exp": ("EXPONENTIAL", []),
    "Log": ("LOGARITHM", []),
    "Sqrt": ("ROOT", []),
    "Abs": ("ABSOLUTE", []),
    "Elu": ("ELU", [("alpha", 1.0), (None, 0.0)]),
    "Erf": ("ERROR", []),
    "Softplus": ("SOFT_PLUS", []),
    "Gelu": ("GELU", []),
}
BINARY = {  # operator → the function in C, and the one with its operands exchanged
    "Add": ("SUM", "SUM"),
    "Sub": ("DIFFERENCE", "DIFFERENCE_FROM"),
    "Mul": ("PRODUCT", "PRODUCT"),
    "Div": ("QUOTIENT", "QUOTIENT_OF"),
    "Max": ("LARGER", "LARGER"),
    "Min": ("SMALLER", "SMALLER"),
}


def mapped(lowering: Lowering, node: onnx.NodeProto) -> None:
    """A function of each element."""
    value = _float(lowering, lowering.input(0))
    function, numbers = MAPS[node.op_type]
    if node.op_type == "Gelu" and lowering.attribute("approximate", b"none") != b"none":
        raise lowering.error("is the approximation by tanh; the exact one has a form in C")
    found = [default if name is None else lowering.attribute(name, default) for name, default in numbers] or [0.0, 0.0]
    _map(lowering, value, function, *map(float, found))


def clip(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Clip: x, low, high."""
    value = _float(lowering, lowering.input(0))
    low, high = lowering.optional(1), lowering.optional(2)
    ends = [-math.inf if low is None else float(low), math.inf if high is None else float(high)]
    _map(lowering, value, "CLIP", *ends)


def _map(lowering: Lowering, value: Value, function: str, a: float, b: float) -> None:
    fields = {"function": function, "count": value.count, "a": np.float32(a), "b": np.float32(b)}
    lowering.step("map", [value], lowering.output(value.channels_last), fields, overlap={0: 0})


def binary(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Arithmetic of two values."""
    if len(node.input) != 2:
        raise lowering.error(f"has {len(node.input)} operands; two have a form in C")
    a, b, result, shares = operands(lowering, 0, 1)
    _float(lowering, a)
    straight, exchanged = BINARY[node.op_type]
    fields = {"operation": straight if a.name == node.input[0] else exchanged} | shares
    lowering.step("binary", [a, b], result, fields, overlap=in_place(a, b, result))


def softmax(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Softmax and LogSoftmax over the last dimension."""
    value = lowering.plain(_float(lowering, lowering.input(0)))
    axis = lowering.attribute("axis", -1) % len(value.shape)
    if math.prod(value.shape[axis + 1 :]) != 1:
        raise lowering.error(f"goes over the dimension {axis} of {len(value.shape)}; the last one has a form in C")
    size = value.shape[axis]
    fields = {"rows": value.count // size, "size": size, "logarithm": int(node.op_type == "LogSoftmax")}
    lowering.step("softmax", [value], lowering.output(), fields, overlap={0: 0})


def conv(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Conv: x, weight, bias."""
    value = lowering.last(_float(lowering, lowering.input(0)))
    weight = lowering.constant(1, "a weight").astype(np.float32)
    weight = weight[:, :, None] if weight.ndim == 3 else weight
    outputs, groups = len(weight), int(lowering.attribute("group", 1))
    place = windows(lowering, value, (weight.shape[2], weight.shape[3]))
    bias = lowering.optional(2)
    fields: dict[str, Any] = {"weights": weight.transpose(0, 2, 3, 1).reshape(-1)} | place
    fields |= {"bias": np.zeros(outputs, np.float32) if bias is None else bias.astype(np.float32)}
    fields |= {"in_channels": value.shape[1], "out_channels": outputs, "groups": groups}
    distance = before(place, 4 * value.shape[1], 4 * outputs)
    lowering.step("float_conv", [value], lowering.output(True), fields, overlap={0: distance})


def gemm(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Gemm: a, b, c."""
    if lowering.attribute("transA", 0):
        raise lowering.error("reads its input turned (transA); exporters write Transpose before it")
    weight = lowering.constant(1, "a weight").astype(np.float32) * np.float32(lowering.attribute("alpha", 1.0))
    rows = weight if lowering.attribute("transB", 0) else weight.T
    given = lowering.optional(2)
    bias = np.zeros(len(rows), np.float32)
    if given is not None:
        bias = bias + given.astype(np.float32).reshape(-1) * np.float32(lowering.attribute("beta", 1.0))
    _linear(lowering, rows, bias)


def matmul(lowering: Lowering, node: onnx.NodeProto) -> None:
    """MatMul by a constant."""
    if node.input[1] not in lowering.constants:
        raise lowering.error("multiplies two values that the network computes, as attention does; a constant weight is needed")
    weight = lowering.constant(1, "a weight").astype(np.float32)
    if weight.ndim != 2:
        raise lowering.error(f"has a weight of shape {weight.shape}; (inputs, outputs) is needed")
    _linear(lowering, weight.T, np.zeros(weight.shape[1], np.float32))


def _linear(lowering: Lowering, rows: np.ndarray, bias: np.ndarray) -> None:
    value = lowering.plain(_float(lowering, lowering.input(0)))
    outputs, inputs = rows.shape
    count = value.count // inputs
    place = {"in_height": 1, "in_width": count, "out_height": 1, "out_width": count, "kernel_height": 1, "kernel_width": 1}
    place |= {"stride_y": 1, "stride_x": 1, "dilation_y": 1, "dilation_x": 1, "pad_top": 0, "pad_left": 0}
    fields: dict[str, Any] = {"weights": np.ascontiguousarray(rows).reshape(-1), "bias": bias} | place
    fields |= {"in_channels": inputs, "out_channels": outputs, "groups": 1}
    lowering.step("float_conv", [value], lowering.output(), fields, overlap={0: before(place, 4 * inputs, 4 * outputs)})


def _float(lowering: Lowering, value: Value) -> Value:
    if value.dtype != "float32":
        raise lowering.error(f"computes on {value.dtype} outside a table; float32 is needed")
    return value


OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(MAPS, mapped),
    **dict.fromkeys(BINARY, binary),
    "Clip": clip,
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    "Conv": conv,
    "Gemm": gemm,
    "MatMul": matmul,
}
