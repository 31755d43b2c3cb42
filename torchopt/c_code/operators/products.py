"""Convolutions and linear layers on integers: `sum of products` whole, then one float32 multiplication, rounded half to even.

    q + z = clamp(round(n · (s_x·s_w / s_y))) + z,      n = Σ x·w + (b − z_x·Σ w)        (`quantize/layers/kernels.py`)

The input's zero point is taken out of the sums once, in the bias; in the padding stands the zero point itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from torchopt.c_code.lower import Lowering, Operator
from torchopt.c_code.operators.grids import Grid, before, grid, windows
from torchopt.c_code.program import Value
from torchopt.c_code.weights import Stored, stored

MOST = 2**31 - 1


def conv(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearConv: x, scale, zero, w, scales, zeros, scale, zero, bias."""
    value = lowering.last(lowering.input(0))
    reads, writes = grid(lowering, 1, value.dtype), grid(lowering, 6, value.dtype)
    weight = _centered(lowering, 3, 5, axis=0)
    weight = weight[:, :, None] if weight.ndim == 3 else weight  # (outputs, inputs of a group, height, width)
    outputs, channels, groups = len(weight), value.shape[1], int(lowering.attribute("group", 1))
    place = windows(lowering, value, (weight.shape[2], weight.shape[3]))
    ratio = reads.scale * lowering.constant(4, "scales").reshape(-1).astype(np.float32) / writes.scale
    bias = lowering.optional(8)
    bias = np.zeros(outputs, np.int64) if bias is None else bias.astype(np.int64)
    result = lowering.output(channels_last=True)
    size = np.dtype(value.dtype).itemsize
    if groups == channels == outputs:
        fields = _scaled(lowering, ratio) | place | writes.ends
        fields |= {"weights": weight[:, 0].transpose(1, 2, 0).reshape(-1), "channels": channels}
        fields |= {"bias": _in_32_bits(lowering, bias, weight), "in_zero": reads.zero, "out_zero": writes.zero}
        lowering.step("depthwise", [value], result, fields, overlap={0: before(place, channels * size, outputs * size)})
        return
    rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)
    direct = math.prod(weight.shape[2:]) == 1 and not place["pad_top"] and not place["pad_left"]
    _product(lowering, value, result, rows, bias, ratio, reads, writes, place, groups, direct)


def gemm(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QGemm: a, scale, zero, b, scales, zeros, bias, scale, zero; without the last two the result is float."""
    if lowering.attribute("transA", 0):
        raise lowering.error("reads its input turned (transA); exporters write Transpose before it")
    value = lowering.plain(lowering.input(0))
    reads = grid(lowering, 1, value.dtype)
    turned = bool(lowering.attribute("transB", 0))
    rows = _centered(lowering, 3, 5, axis=0 if turned else 1)
    rows = rows if turned else rows.T
    step = (
        np.float32(lowering.attribute("alpha", 1.0)) * reads.scale * lowering.constant(4, "scales").reshape(-1).astype(np.float32)
    )
    bias = lowering.optional(6)
    bias = np.zeros(len(rows), np.int64) if bias is None else np.broadcast_to(bias.reshape(-1), len(rows)).astype(np.int64)
    writes = grid(lowering, 7, value.dtype) if len(node.input) > 7 and node.input[7] else None
    _linear(lowering, value, lowering.output(), rows, bias, step, reads, writes)


def matmul(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearMatMul: a, scale, zero, b, scales, zeros, scale, zero."""
    value = lowering.plain(lowering.input(0))
    reads, writes = grid(lowering, 1, value.dtype), grid(lowering, 6, value.dtype)
    rows = _matrix(lowering, 3, 5)
    step = reads.scale * lowering.constant(4, "scales").reshape(-1).astype(np.float32)
    _linear(lowering, value, lowering.output(), rows, np.zeros(len(rows), np.int64), step, reads, writes)


def matmul_to_float(lowering: Lowering, node: onnx.NodeProto) -> None:
    """MatMulIntegerToFloat: a, b, scale, scales, zero, zeros, bias."""
    value = lowering.plain(lowering.input(0))
    rows = _matrix(lowering, 1, 5)
    limits = np.iinfo(value.dtype)
    scale, zero = np.float32(lowering.scalar(2, "scales")), int(lowering.scalar(4, "zero points"))
    reads = Grid(scale=scale, zero=zero, qmin=int(limits.min), qmax=int(limits.max))
    step = scale * lowering.constant(3, "scales").reshape(-1).astype(np.float32)
    bias = lowering.optional(6)
    result = lowering.output()
    product = result if bias is None else Value(name=result.name, shape=result.shape, dtype=result.dtype)
    _linear(lowering, value, product, rows, np.zeros(len(rows), np.int64), step, reads, None)
    if bias is not None:
        added = Value(name=f"{result.name}_bias", shape=bias.shape, dtype="float32", constant=bias.astype(np.float32))
        fields = {"operation": "SUM", "outer": result.count // bias.size, "count": bias.size, "inner": 1}
        lowering.step("binary", [product, added], result, fields, overlap={0: 0})


def _matrix(lowering: Lowering, index: int, zeros: int) -> np.ndarray:
    """The rows (outputs, inputs) of a matrix that stands on the right."""
    if lowering.node.input[index] not in lowering.constants:
        raise lowering.error("multiplies two values that the network computes, as attention does; a constant weight is needed")
    weight = _centered(lowering, index, zeros, axis=1)
    if weight.ndim != 2:
        raise lowering.error(f"has a weight of shape {weight.shape}; (inputs, outputs) is needed")
    return weight.T


def _linear(
    lowering: Lowering,
    value: Value,
    result: Value,
    rows: np.ndarray,
    bias: np.ndarray,
    step: np.ndarray,
    reads: Grid,
    writes: Grid | None,
) -> None:
    outputs, inputs = rows.shape
    count = value.count // inputs
    if writes is None:
        form = stored(np.ascontiguousarray(rows))
        fields = _weights(form) | _scaled(lowering, step) | {"bias": _in_32_bits(lowering, bias, rows, reads.zero)}
        fields |= {"rows": count, "inputs": inputs, "outputs": outputs}
        lowering.step("linear_to_float", [value], result, fields, scratch=_scratch(form, inputs, gathered=0))
        return
    place = {"in_height": 1, "in_width": count, "out_height": 1, "out_width": count, "kernel_height": 1, "kernel_width": 1}
    place |= {"stride_y": 1, "stride_x": 1, "dilation_y": 1, "dilation_x": 1, "pad_top": 0, "pad_left": 0}
    _product(lowering, value, result, rows, bias, step / writes.scale, reads, writes, place, 1, direct=True)


def _product(
    lowering: Lowering,
    value: Value,
    result: Value,
    rows: np.ndarray,
    bias: np.ndarray,
    ratio: np.ndarray,
    reads: Grid,
    writes: Grid,
    place: dict[str, int],
    groups: int,
    direct: bool,
) -> None:
    """Add the step of a convolution, or of a linear layer whose rows are pixels."""
    outputs, taps = rows.shape
    channels = taps // (place["kernel_height"] * place["kernel_width"]) * groups
    form = stored(np.ascontiguousarray(rows))
    fields = _weights(form) | _scaled(lowering, ratio) | place | writes.ends
    fields |= {"bias": _in_32_bits(lowering, bias, rows, reads.zero), "in_zero": reads.zero, "out_zero": writes.zero}
    fields |= {"in_channels": channels, "out_channels": outputs, "groups": groups}
    scratch = _scratch(form, taps, gathered=0 if direct else 4)
    distance = before(place, channels, outputs, at_once=4)
    lowering.step("conv", [value], result, fields, scratch=scratch, overlap={0: distance})


def _scratch(form: Stored, taps: int, *, gathered: int) -> int:
    return (gathered + (form.form == "CODES")) * taps


def _weights(form: Stored) -> dict[str, Any]:
    step = 16 if form.table is not None and len(form.table) > 1 else 0
    return {"weights": {"form": form.form, "table_step": step, "data": form.data, "table": form.table, "counts": form.counts}}


def _scaled(lowering: Lowering, ratio: np.ndarray) -> dict[str, Any]:
    """One ratio where all are the same."""
    if not np.isfinite(ratio).all():
        raise lowering.error("has scales whose ratio is not finite")
    same = bool((ratio == ratio[0]).all())
    return {"ratio": ratio[:1] if same else ratio, "ratio_step": 0 if same else 1}


def _in_32_bits(lowering: Lowering, bias: np.ndarray, weights: np.ndarray, zero: int = 0) -> np.ndarray:
    """The bias with the zero point taken off, modulo 2³² as the kernels add it; a sum of products itself must fit 32 bits."""
    rows = weights.reshape(len(weights), -1).astype(np.int64)
    largest = int(np.abs(rows).sum(1).max()) * 255
    if largest > MOST:
        raise lowering.error(f"has sums of products up to {largest:,}, which do not fit 32 bits; smaller weights are needed")
    return (bias - zero * rows.sum(1)).astype(np.int64).astype(np.uint64).astype(np.uint32).view(np.int32)


def _centered(lowering: Lowering, index: int, zeros: int, *, axis: int) -> np.ndarray:
    """The integer weight with its zero points taken off, in int8."""
    weight, zero = lowering.constant(index, "a weight"), lowering.optional(zeros)
    shifted = weight.astype(np.int32)
    if zero is not None and zero.any():
        shape = [1] * weight.ndim
        shape[axis] = -1
        shifted = shifted - zero.astype(np.int32).reshape(shape)
    if shifted.size and (shifted.min() < -128 or shifted.max() > 127):
        raise lowering.error(f"has weights from {shifted.min()} to {shifted.max()}; -128 to 127 is needed")
    return shifted.astype(np.int8)


OPERATORS: dict[str, Operator] = {
    "QLinearConv": conv,
    "QGemm": gemm,
    "QLinearMatMul": matmul,
    "MatMulIntegerToFloat": matmul_to_float,
}
