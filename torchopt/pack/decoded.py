"""The values of the weights in a graph: what stands between an initializer of integers and the float that torch has.

1. q → DequantizeLinear(s)                                     q · s
2. q → [Reshape] → Cast → Mul(s) → [Reshape]                   q · s, in blocks of inputs with the Reshapes
3. h → Cast                                                    float16 weights
4. q → Transpose → MatMulInteger → Cast → Mul(x_scale · s)     q · s, the weight is (outputs, inputs)
5. q → Pad, Reshape, Slice, Transpose → DequantizeLinear(s)    q · s, each where q has it, the zeros around it left out
6. u → MatMulNBits(s, z), GatherBlockQuantized                 (q − z) · s, codes side by side in bytes, a scale a block (`nbits`)

A scale may itself be float16, with a Cast. The weight may stand in any scope: in a Constant node, a branch, a body, a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from torchopt.onnx_file.nbits import KINDS, BlockCodes, Lookup, block_codes
from torchopt.onnx_file.view import View

WIDENED = 64  # times as large: more than any channels of zeros make a weight; a small file never claims a huge one


def weight_values(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the value of each constant of an unpacked model, integers times their scale, by name; the first one's of a name."""
    view = View(model)
    lookup = _lookup(view)
    values: dict[str, np.ndarray] = {}
    for constant in view.constants:
        raw = lookup(constant.value)
        if raw is None or constant.name in values:
            continue
        values[constant.name] = raw
        for user, index in constant.value.uses():
            if index == KINDS.get(user.op_type, 0) and (value := _value(raw, user, lookup)) is not None:
                values[constant.name] = value
    return values


def weights_in_blocks(model: ir.Model) -> dict[str, BlockCodes]:
    """Return the weights of an unpacked model whose codes lie side by side in bytes, by the name of the constant that holds them."""
    view = View(model)
    lookup = _lookup(view)
    found = {}
    for _, node in view.nodes:
        codes = block_codes(node, lambda value: _constant(value, lookup))
        weight = node.inputs[KINDS[node.op_type]] if codes is not None else None
        if codes is not None and weight is not None:
            found[str(weight.name)] = codes
    return found


def _lookup(view: View) -> Lookup:
    """What gives the array of a constant of a model, and None for other values."""
    known = {id(c.value): c.tensor for c in view.constants if c.tensor is not None and c.tensor.dtype != ir.DataType.STRING}

    def lookup(value: ir.Value | None) -> np.ndarray | None:
        tensor = known.get(id(value))
        return None if tensor is None else tensor.numpy()

    return lookup


def halves(stored: np.ndarray) -> np.ndarray:
    """Return the int8 codes −8 … 7 of shape (outputs, inputs) that bytes of shape (outputs, blocks, block/2) hold.

    Example:
        >>> halves(np.array([[[240, 152]]], np.uint8)).tolist()
        [[-8, 7, 0, 1]]
    """
    return (np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8).reshape(len(stored), -1)


def _value(stored: np.ndarray, user: ir.Node, raw: Lookup) -> np.ndarray | None:
    """What an initializer stands for by the node that reads it first, or None where it stands for itself."""
    if user.op_type in KINDS:
        codes = block_codes(user, lambda v: _constant(v, raw))
        return None if codes is None else codes.values
    if user.op_type == "DequantizeLinear":
        return _dequantized(stored, user, raw)
    if user.op_type == "Cast":
        wanted = ir.DataType(user.attributes["to"].as_int())
        if wanted == ir.DataType.STRING:
            return None
        value = stored.astype(wanted.numpy())
        scale = _scale(_reader(user, "Mul"), raw) if stored.dtype.kind == "i" else None
        return value if scale is None else value * scale
    if (
        user.op_type == "Reshape"
        and (cast := _reader(user, "Cast")) is not None
        and (shape := _constant(user.inputs[1], raw)) is not None
    ):
        apart = _value(_reshaped(stored, shape), cast, raw)
        return None if apart is None else apart.reshape(stored.shape)
    if user.op_type in MOVES and (moved := _moved(stored, user, raw)) is not None:
        return moved
    return _transposed(stored, user, raw) if user.op_type == "Transpose" else None


def _moved(stored: np.ndarray, node: ir.Node | None, raw: Lookup) -> np.ndarray | None:
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
    if value is None:
        return None
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


def _reshaped(array: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """As ONNX has it: 0 keeps the size."""
    return array.reshape([int(size) or (array.shape[i] if i < array.ndim else 0) for i, size in enumerate(shape.reshape(-1))])


MOVES: dict[str, Callable[[np.ndarray, ir.Node, list[Any]], np.ndarray]] = {
    "Pad": _pad,
    "Reshape": lambda array, node, operands: _reshaped(array, operands[0]),
    "Slice": _slice,
    "Transpose": lambda array, node, operands: array.transpose(list(node.attributes["perm"].as_ints())),
}


def _transposed(stored: np.ndarray, user: ir.Node, raw: Lookup) -> np.ndarray | None:
    """Case 4."""
    product = _reader(user, "MatMulInteger")
    cast = _reader(product, "Cast") if product is not None else None
    scaled = _reader(cast, "Mul") if cast is not None else None
    factors = [v.producer() for v in scaled.inputs if v is not None] if scaled is not None else []
    scale = next((s for f in factors if f is not None and f.op_type == "Mul" and (s := _scale(f, raw)) is not None), None)
    return None if scale is None else stored.astype(np.float32) * (scale[:, None] if scale.ndim else scale)


def _reader(node: ir.Node, kind: str) -> ir.Node | None:
    return next((user for user, _ in node.outputs[0].uses() if user.op_type == kind), None)


def _scale(node: ir.Node | None, raw: Lookup) -> np.ndarray | None:
    """The constant operand of a multiplication."""
    operands = [_constant(v, raw) for v in node.inputs] if node is not None else []
    return next((operand for operand in operands if operand is not None), None)


def _constant(value: ir.Value | None, raw: Lookup) -> np.ndarray | None:
    """A constant, also one that is stored as float16; None for what is computed."""
    cast = value.producer() if value is not None else None
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        stored = raw(cast.inputs[0])
        return stored.astype(np.float32) if stored is not None and stored.dtype == np.float16 else None
    return raw(value)


def _dequantized(q: np.ndarray, node: ir.Node, raw: Lookup) -> np.ndarray | None:
    operands = [_constant(v, raw) for v in node.inputs]
    scale, zero = operands[1], operands[2] if len(operands) > 2 else None
    if scale is None or (zero is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None  # a scale that is computed
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0

    def spread(array: np.ndarray) -> np.ndarray:
        if block:
            return array.repeat(block, axis=axis)[tuple(slice(size) for size in q.shape)]
        return array.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]) if array.size > 1 else array.reshape(())

    codes = q.astype(np.float32)
    if zero is not None:
        codes = codes - spread(zero).astype(np.float32)
    return np.asarray((codes * spread(scale).astype(np.float32)).astype(scale.dtype))
