"""Operators that move elements and compute nothing: reshapes cost nothing, the others are one step."""

from __future__ import annotations

import math

import numpy as np
import onnx

from torchopt.c_code.lower import Lowering, Operator
from torchopt.c_code.operators.grids import grid
from torchopt.c_code.program import Value


def reshape(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze."""
    lowering.alias(lowering.plain(lowering.input(0)))


def identity(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Identity and Dropout."""
    value = lowering.input(0)
    lowering.known[node.output[0]] = value.alias(node.output[0], value.shape, channels_last=value.channels_last)


def transpose(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Transpose."""
    value = lowering.plain(lowering.input(0))
    order = list(lowering.attribute("perm") or range(len(value.shape))[::-1])
    kept = [k for k in order if value.shape[k] != 1]
    if kept == sorted(kept):
        lowering.alias(value)
    else:
        lowering.move(value, lowering.output(), list(value.shape), order)


def concat(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Concat."""
    _joined(lowering, [lowering.value(name) for name in node.input])


def integer_concat(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearConcat: scale, zero, then x, scale, zero of each part; a part on another grid is rounded anew through a table."""
    parts = []
    for index in range(2, len(node.input), 3):
        value = lowering.input(index)
        writes, reads = grid(lowering, 0, value.dtype), grid(lowering, index + 1, value.dtype)
        if (reads.scale, reads.zero) != (writes.scale, writes.zero):
            integers = np.arange(256).astype(np.uint8).view(value.dtype)
            floats = (integers.astype(np.int32) - reads.zero).astype(np.float32) * reads.scale
            rounded = np.clip(np.rint(floats / writes.scale) + writes.zero, writes.qmin, writes.qmax).astype(value.dtype)
            other = Value(name=f"{value.name}_rounded", shape=value.shape, dtype=value.dtype, channels_last=value.channels_last)
            lowering.step("table", [value], other, {"count": value.count, "values": rounded}, overlap={0: 0})
            value = other
        parts.append(value)
    _joined(lowering, parts)


def _joined(lowering: Lowering, parts: list[Value]) -> None:
    rank = len(parts[0].shape)
    axis = lowering.attribute("axis", 0) % rank
    last = any(part.channels_last and not part.layouts_agree for part in parts)
    parts = [lowering.last(part) if last else lowering.plain(part) for part in parts]
    result = lowering.output(last)
    along = axis if not last or axis == 0 else rank - 1 if axis == 1 else axis - 1
    offset, step = 0, _run(result, along)
    for part in parts:
        run = _run(part, along)
        fields = {"runs": part.count // run, "run": run, "step": step, "offset": offset}
        lowering.step("concat", [part], result, fields)
        offset += run


def _run(value: Value, along: int) -> int:
    shape = value.shape
    memory = (shape[0], *shape[2:], shape[1]) if value.channels_last else shape
    return math.prod(memory[along:])


def pad(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Pad with a constant."""
    mode = (lowering.attribute("mode") or b"constant").decode()
    if mode != "constant":
        raise lowering.error(f"fills with mode {mode!r}; 'constant' has a form in C")
    value = lowering.input(0)
    rank = len(value.shape)
    given = lowering.attribute("pads") if len(node.input) < 2 else lowering.constant(1, "sizes").tolist()
    fill = float(lowering.attribute("value", 0.0)) if len(node.input) < 2 else float(lowering.scalar(2, "fills"))
    axes = lowering.optional(3)
    pads = [(0, 0)] * rank
    for number, axis in enumerate(range(rank) if axes is None else axes.tolist()):
        pads[axis % rank] = (int(given[number]), int(given[number + len(given) // 2]))
    _cut(lowering, value, node.output[0], pads, fill)


def cut(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Slice: data, starts, ends, dimensions, steps."""
    value = lowering.input(0)
    rank = len(value.shape)
    starts, ends = (lowering.constant(k, "ends").tolist() for k in (1, 2))
    axes, steps = lowering.optional(3), lowering.optional(4)
    if steps is not None and (steps != 1).any():
        raise lowering.error(f"takes every {steps.tolist()}th element; steps of 1 have a form in C")
    pads = [(0, 0)] * rank
    for start, end, axis in zip(starts, ends, range(rank) if axes is None else axes.tolist(), strict=False):
        size = value.shape[axis % rank]
        first, last, _ = slice(start, end).indices(size)
        pads[axis % rank] = (-first, last - size)
    _cut(lowering, value, node.output[0], pads, 0.0)


def split(lowering: Lowering, node: onnx.NodeProto) -> None:
    """Split: a cut for each result."""
    value = lowering.input(0)
    axis = lowering.attribute("axis", 0) % len(value.shape)
    at = 0
    for name in node.output:
        size = lowering.found.values[name].shape[axis]
        pads = [(0, 0)] * len(value.shape)
        pads[axis] = (-at, at + size - value.shape[axis])
        _cut(lowering, value, name, pads, 0.0)
        at += size


def _cut(lowering: Lowering, value: Value, name: str, pads: list[tuple[int, int]], fill: float) -> None:
    shape = list(value.shape)
    if value.channels_last:
        shape, pads = [shape[0], *shape[2:], shape[1]], [pads[0], *pads[2:], pads[1]]
    lowering.move(value, lowering.new(name, value.channels_last), shape, list(range(len(shape))), pads, fill)


OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys(("Identity", "Dropout"), identity),
    "Transpose": transpose,
    "Concat": concat,
    "QLinearConcat": integer_concat,
    "Pad": pad,
    "Slice": cut,
    "Split": split,
}
