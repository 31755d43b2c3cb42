"""Rounding, sums and products of integers on their grids, with ONNX Runtime's formulas (`quantize/layers/kernels.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from torchopt.c_code.lower import Lowering, Operator
from torchopt.c_code.operators.grids import Grid, grid, outer_count_inner
from torchopt.c_code.program import Value


def quantize(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QuantizeLinear; a network's own input comes to lie as the first convolution reads it."""
    value = lowering.input(0)
    if value.dtype != "float32":
        raise lowering.error(f"reads {value.dtype}; float32 is needed")
    dtype = lowering.found.values[node.output[0]].dtype.name
    if dtype not in ("uint8", "int8"):
        raise lowering.error(f"rounds to {dtype}; uint8 and int8 have a form in C")
    writes = grid(lowering, 1, dtype)
    turns = not value.channels_last and len(value.shape) > 2 and lowering.wants_channels_last(node.output[0])
    turns = turns and value.shape[0] == 1
    channels = value.shape[1] if turns else 1
    fields: dict[str, Any] = {"channels": channels, "pixels": value.count // channels, "scale": writes.scale, "zero": writes.zero}
    result = lowering.output(turns or value.channels_last)
    lowering.step("quantize", [value], result, fields | writes.ends, dtype=dtype, overlap={0: 0} if channels == 1 else None)


def dequantize(lowering: Lowering, node: onnx.NodeProto) -> None:
    """DequantizeLinear of what the network computes."""
    value = lowering.input(0)
    if value.dtype not in ("uint8", "int8"):
        raise lowering.error(f"reads {value.dtype}; uint8 and int8 have a form in C")
    reads = grid(lowering, 1, value.dtype)
    fields = {"count": value.count, "scale": reads.scale, "zero": reads.zero}
    lowering.step("dequantize", [value], lowering.output(value.channels_last), fields, overlap={0: 3 * value.count})


def add(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearAdd: a, scale, zero, b, scale, zero, scale, zero."""
    a, b, result, shares = operands(lowering, 0, 3)
    first, second = _grids(lowering, a.name == node.input[0])
    writes = grid(lowering, 6, a.dtype)
    ratio, other = first.scale / writes.scale, second.scale / writes.scale
    inner = np.float32(np.float64(ratio) * first.zero + np.float64(np.float32(other * np.float32(second.zero))))
    fields = shares | {"ratio_a": ratio, "ratio_b": other, "fixed": np.float32(np.float32(writes.zero) - inner)}
    lowering.step("add", [a, b], result, fields | writes.limits, overlap=in_place(a, b, result))


def multiply(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearMul: the same inputs."""
    a, b, result, shares = operands(lowering, 0, 3)
    first, second = _grids(lowering, a.name == node.input[0])
    writes = grid(lowering, 6, a.dtype)
    fields = shares | {"zero_a": first.zero, "zero_b": second.zero, "ratio": first.scale * second.scale / writes.scale}
    fields |= {"zero": np.float32(writes.zero)} | writes.limits
    lowering.step("multiply", [a, b], result, fields, overlap=in_place(a, b, result))


def _grids(lowering: Lowering, in_order: bool) -> tuple[Grid, Grid]:
    dtype = lowering.input(0).dtype
    first, second = grid(lowering, 1, dtype), grid(lowering, 4, dtype)
    return (first, second) if in_order else (second, first)


def operands(lowering: Lowering, first: int, second: int) -> tuple[Value, Value, Value, dict[str, int]]:
    """Return the operand that has the result's shape, the other one, the result, and how often the other one's elements are read.

    Raises:
        ModelError: neither has that shape, or the other one's elements lie beside it in no simple order.
    """
    a, b, shape = lowering.input(first), lowering.input(second), lowering.shape()
    if a.shape != shape or a.root.constant is not None:
        a, b = b, a
    if a.channels_last or (b.channels_last and not b.layouts_agree):
        a = lowering.last(a)
        b = _channels_last(lowering, b, len(shape))
    whole = _memory(a)
    shares = outer_count_inner(whole, _memory(b)) if a.shape == shape else None
    if shares is None or a.root.constant is not None:
        raise lowering.error(
            f"joins shapes {a.shape} and {b.shape}; equal ones, or one value a channel beside the other, are needed"
        )
    return a, b, lowering.output(a.channels_last), dict(zip(("outer", "count", "inner"), shares, strict=True))


def _channels_last(lowering: Lowering, value: Value, rank: int) -> Value:
    """An operand beside one with its channels last."""
    if value.channels_last or value.count == 1:
        return value
    if len(value.shape) < rank:
        value = value.alias(value.name, (1,) * (rank - len(value.shape)) + value.shape)
    return lowering.last(value)


def _memory(value: Value) -> tuple[int, ...]:
    shape = value.shape
    return (shape[0], *shape[2:], shape[1]) if value.channels_last else shape


def in_place(a: Value, b: Value, result: Value) -> dict[int, int]:
    """Return which operands the result may be written over."""
    return {k: 0 for k, value in enumerate((a, b)) if value.size == result.size}


OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "QLinearAdd": add,
    "QLinearMul": multiply,
}
