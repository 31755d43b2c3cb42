"""The values of the weights in a graph: what stands between an initializer of integers and the float that torch has.

1. q → DequantizeLinear(s)                                     q · s
2. q → [Reshape] → Cast → Mul(s) → [Reshape]                   q · s, in blocks of inputs with the Reshapes
3. h → Cast                                                    float16 weights
4. q → Transpose → MatMulInteger → Cast → Mul(x_scale · s)     q · s, the weight is (outputs, inputs)
5. q → Pad, Reshape, Slice, Transpose → DequantizeLinear(s)    q · s, each where q has it, the zeros around it left out
6. u → MatMulNBits(s)                                          (q − 8) · s, two codes a byte, a scale a block

A scale may itself be float16, with a Cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

WIDENED = 64  # times as large: more than any channels of zeros make a weight; a small file never claims a huge one


def weight_values(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the value of each initializer of an unpacked graph, integers times their scale, by name."""
    raw = {str(name): v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value is not None}
    values = dict(raw)
    for name in raw:
        for user, index in model.graph.initializers[name].uses():
            if index == (1 if user.op_type == "MatMulNBits" else 0) and (value := _value(raw[name], user, raw)) is not None:
                values[name] = value
    return values


def two_a_byte(model: ir.Model) -> list[str]:
    """Return the names of the weights that hold two 4-bit codes a byte, packed or not."""
    found = [node.inputs[1] for node in model.graph if node.op_type == "MatMulNBits"]
    return list(dict.fromkeys(str(value.name) for value in found if value is not None))


def halves(stored: np.ndarray) -> np.ndarray:
    """Return the int8 codes −8 … 7 of shape (outputs, inputs) that bytes of shape (outputs, blocks, block/2) hold.

    Example:
        >>> halves(np.array([[[240, 152]]], np.uint8)).tolist()
        [[-8, 7, 0, 1]]
    """
    return (np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8).reshape(len(stored), -1)


def _value(stored: np.ndarray, user: ir.Node, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """What an initializer stands for by the node that reads it first, or None where it stands for itself."""
    if user.op_type == "MatMulNBits":
        scale = _constant(user.inputs[2], raw)
        block = user.attributes["block_size"].as_int()
        return None if scale is None else halves(stored).astype(np.float32) * scale.repeat(block, axis=1)
    if user.op_type == "DequantizeLinear":
        return _dequantized(stored, user, raw)
    if user.op_type == "Cast":
        value = stored.astype(ir.DataType(user.attributes["to"].as_int()).numpy())
        scale = _scale(_reader(user, "Mul"), raw) if stored.dtype.kind == "i" else None
        return value if scale is None else value * scale
    if (
        user.op_type == "Reshape"
        and (cast := _reader(user, "Cast")) is not None
        and (shape := _constant(user.inputs[1], raw)) is not None
    ):
        apart = _value(stored.reshape(shape), cast, raw)
        return None if apart is None else apart.reshape(stored.shape)
    if user.op_type in MOVES and (moved := _moved(stored, user, raw)) is not None:
        return moved
    return _transposed(stored, user, raw) if user.op_type == "Transpose" else None


def _moved(stored: np.ndarray, node: ir.Node | None, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """Case 5: the places of the elements are moved with them, from 1 on, and 0 is what was added."""
    codes, places = stored, np.arange(1, stored.size + 1).reshape(stored.shape)
    while node is not None and node.op_type in MOVES:
        operands = [_constant(v, raw) for v in node.inputs[1:]]
        if any(operand is None for operand in operands):
            return None
        try:
            codes, places = (MOVES[node.op_type](array, node, operands) for array in (codes, places))
        except (IndexError, KeyError, TypeError, ValueError):  # sizes or forms that no pass of ours writes
            return None
        node = next((user for user, _ in node.outputs[0].uses() if user.op_type in {*MOVES, "DequantizeLinear"}), None)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    value, real = _dequantized(codes, node, raw), places > 0
    back = np.empty(stored.size, np.float32)
    back[places[real] - 1] = value[real]
    return back.reshape(stored.shape) if np.count_nonzero(real) == stored.size else None


def _pad(array: np.ndarray, node: ir.Node, operands: list[Any]) -> np.ndarray:
    ends = operands[0].reshape(2, array.ndim)
    if math.prod(size + int(added) for size, added in zip(array.shape, ends.sum(axis=0), strict=True)) > WIDENED * array.size:
        raise ValueError("more zeros than any pass of ours adds")
    return np.pad(array, list(zip(*ends, strict=True)))


def _slice(array: np.ndarray, node: ir.Node, operands: list[Any]) -> np.ndarray:
    parts = [slice(None)] * array.ndim
    for start, end, axis, step in zip(*operands, strict=True):
        parts[axis] = slice(start, None if end < -array.shape[axis] else end, step)
    return array[tuple(parts)]


MOVES: dict[str, Callable[[np.ndarray, ir.Node, list[Any]], np.ndarray]] = {
    "Pad": _pad,
    "Reshape": lambda array, node, operands: array.reshape(operands[0]),
    "Slice": _slice,
    "Transpose": lambda array, node, operands: array.transpose(list(node.attributes["perm"].as_ints())),
}


def _transposed(stored: np.ndarray, user: ir.Node, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """Case 4."""
    product = _reader(user, "MatMulInteger")
    cast = _reader(product, "Cast") if product is not None else None
    scaled = _reader(cast, "Mul") if cast is not None else None
    factors = [v.producer() for v in scaled.inputs if v is not None] if scaled is not None else []
    scale = next((s for f in factors if f is not None and f.op_type == "Mul" and (s := _scale(f, raw)) is not None), None)
    return None if scale is None else stored.astype(np.float32) * (scale[:, None] if scale.ndim else scale)


def _reader(node: ir.Node, kind: str) -> ir.Node | None:
    return next((user for user, _ in node.outputs[0].uses() if user.op_type == kind), None)


def _scale(node: ir.Node | None, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """The constant operand of a multiplication."""
    operands = [_constant(v, raw) for v in node.inputs] if node is not None else []
    return next((operand for operand in operands if operand is not None), None)


def _constant(value: ir.Value | None, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """A constant, also one that is stored as float16; None for what is computed."""
    cast = value.producer() if value is not None else None
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        stored = raw.get(str(cast.inputs[0].name))
        return stored.astype(np.float32) if stored is not None and stored.dtype == np.float16 else None
    return raw.get(str(value.name)) if value is not None else None


def _dequantized(q: np.ndarray, node: ir.Node, raw: dict[str, np.ndarray]) -> np.ndarray:
    operands = [_constant(v, raw) for v in node.inputs]
    scale, zero_point = operands[1], operands[2] if len(operands) > 2 else None
    assert scale is not None
    zero_point = np.zeros(1, q.dtype) if zero_point is None else zero_point
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1

    def spread(array: np.ndarray) -> np.ndarray:
        return array.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]) if array.size > 1 else array.reshape(())

    return (q.astype(np.float32) - spread(zero_point).astype(np.float32)) * spread(scale)
