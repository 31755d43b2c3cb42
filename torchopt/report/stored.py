"""What a file holds of each weight: its symbols, its bits, its bytes with scales and zero points, in whatever form a tool wrote it.

A weight is a constant of two dimensions or more that a node computes with; masks and states, of two values at most, are none. Scales
and zero points are no weights: their bytes count with the weight that they belong to, which is found by the operator that reads both.
Symbols are integers with zero at zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from torchopt.onnx_file.nbits import BlockCodes
from torchopt.onnx_file.read import read
from torchopt.onnx_file.view import BOTH, RUNTIMES, STANDARD, Constant, View
from torchopt.pack.decoded import weights_in_blocks
from torchopt.pack.pack import unpack_model
from torchopt.runtime.found import layers

Parts = dict[int, tuple[int | None, int | None]]  # input of a weight → inputs of its scale and its zero point
PARTS: dict[str, Parts] = {
    "DequantizeLinear": {0: (1, 2)},
    "QLinearConv": {3: (4, 5), 0: (1, 2)},
    "QLinearMatMul": {3: (4, 5), 0: (1, 2)},
    "QGemm": {3: (4, 5)},
    "ConvInteger": {1: (None, 3)},
    "MatMulInteger": {1: (None, 3), 0: (None, 2)},
    "MatMulIntegerToFloat": {1: (3, 5)},
    "DynamicQuantizeMatMul": {1: (2, 3)},
    "DynamicQuantizeLSTM": {1: (8, 9), 2: (10, 11)},
    "QAttention": {1: (4, 7)},
    "MatMulNBits": {1: (2, 3)},
    "MatMulBnb4": {1: (2, 3)},
    "GatherBlockQuantized": {0: (2, 3)},
}
MOVES = {"Gather", "Cast", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Pad", "Concat"}
PRODUCTS = {"MatMulInteger", "ConvInteger"}  # whose scale is multiplied with what comes out
KEPT = {
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE),
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2),
    *(ir.DataType.INT16, ir.DataType.UINT16),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A weight as a file holds it.

    Attributes:
        name: with its scope.
        symbols: integers with zero at zero, or the values.
        bytes: of the weight, its scales and its zero points.
        bits: of a code; None for float32 and float64.
        kind: "int", or the type of a float.
    """

    name: str
    symbols: np.ndarray
    bytes: int
    bits: int | None
    kind: str


def stored(path: str | os.PathLike[str]) -> list[Stored]:
    """Return the weights of a file, in the order in which its nodes read them.

    Raises:
        FileError: it is missing, damaged, or no ONNX file.
    """
    packed = View(read(path))
    model = read(path)
    unpack_model(model, str(path))
    view, blocks = View(model), weights_in_blocks(model)
    sizes = {(c.scope.name, c.name): c.stored_bytes for c in packed.constants}
    known = {id(c.value): c for c in view.constants}
    beside = {id(c.value): _beside(c, known) for c in view.constants}
    parts = {id(part) for found in beside.values() for part in found}
    order = {id(node): place for place, (_, node) in enumerate(view.nodes)}
    rows, counted = [], set[int]()
    used = {id(layer.weight.value) for layer in layers(view) if layer.weight is not None}
    weights = [c for c in view.constants if id(c.value) not in parts and _is_weight(c, used, blocks)]
    for constant in sorted(weights, key=lambda c: _place(c, order)):
        own = sizes.get((constant.scope.name, constant.name), constant.stored_bytes)
        extra = [part for part in beside[id(constant.value)] if id(part) not in counted]
        counted |= {id(part) for part in extra}
        more = sum(sizes.get((known[id(p)].scope.name, known[id(p)].name), known[id(p)].stored_bytes) for p in extra)
        rows.append(_row(constant, own + more, blocks, known))
    return rows


def _is_weight(constant: Constant, used: set[int], blocks: dict[str, BlockCodes]) -> bool:
    """True for weights of layers and tables that are looked up in; of others, for all but biases, states and masks."""
    tensor = constant.tensor
    if tensor is None or not constant.readers or tensor.dtype not in KEPT or tensor.size == 0:
        return False
    looked_up = any(node.op_type == "Gather" and index == 0 for node, index in constant.readers)
    if constant.name in blocks or id(constant.value) in used or looked_up:
        return constant.name in blocks or len(tensor.shape) > 1
    of_cells = all(node.op_type in BOTH for node, _ in constant.readers)
    return len(tensor.shape) > 1 and not of_cells and len(np.unique(tensor.numpy())) > 2


def _place(constant: Constant, order: dict[int, int]) -> int:
    """Where in the file the first node stands that computes with a weight, past those that decode it."""
    found, waiting, seen = len(order), [node for node, _ in constant.readers], set[int]()
    for node in waiting:  # it grows
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type in MOVES or node.op_type in ("DequantizeLinear", "Mul"):
            waiting += [user for value in node.outputs for user, _ in value.uses()]
        else:
            found = min(found, order.get(id(node), found))
    return found


def _row(constant: Constant, size: int, blocks: dict[str, BlockCodes], known: dict[int, Constant]) -> Stored:
    name = f"{constant.scope.name}/{constant.name}" if constant.scope.name else constant.name
    assert constant.tensor is not None
    dtype, codes = constant.tensor.dtype, blocks.get(constant.name)
    if codes is not None:
        return Stored(name=name, symbols=codes.symbols, bytes=size, bits=codes.bits, kind="int")
    value = constant.tensor.numpy()
    if not dtype.is_integer():
        narrow = dtype.bitwidth if dtype.bitwidth < 32 else None
        symbols = value.astype(np.float32) if dtype == ir.DataType.BFLOAT16 else value
        return Stored(name=name, symbols=symbols, bytes=size, bits=narrow, kind=dtype.name.lower())
    return Stored(name=name, symbols=_centred(value, constant, known), bytes=size, bits=dtype.bitwidth, kind="int")


def _centred(value: np.ndarray, constant: Constant, known: dict[int, Constant]) -> np.ndarray:
    """Codes less their zero point, which is one number, or one for each channel."""
    codes = value.astype(np.int32)
    for node, index in constant.readers:
        place = PARTS.get(node.op_type, {}).get(index, (None, None))[1]
        operand = node.inputs[place] if place is not None and place < len(node.inputs) else None
        tensor = known[id(operand)].tensor if id(operand) in known else None
        if tensor is None:
            continue
        zero = tensor.numpy().astype(np.int32)
        if zero.size == 1:
            return codes - zero.reshape(())
        if zero.ndim == codes.ndim:  # in blocks along one of the axes
            for along, (size, count) in enumerate(zip(codes.shape, zero.shape, strict=True)):
                zero = zero.repeat(-(-size // max(count, 1)), axis=along).take(range(size), axis=along)
            return codes - zero
        axis = _axis(node, zero.size, codes.shape)
        if zero.ndim == 1 and axis is not None:
            return codes - zero.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
    return codes


def _axis(node: ir.Node, count: int, shape: tuple[int, ...]) -> int | None:
    """The axis that a row of zero points runs along."""
    if node.op_type == "DequantizeLinear":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    else:
        axis = 0 if "Conv" in node.op_type else len(shape) - 1
    axis %= len(shape)
    return axis if shape[axis] == count else None


def _beside(constant: Constant, known: dict[int, Constant]) -> list[ir.Value]:
    """The constants that only scale a weight or say its zero, as it is stored or after its form has changed."""
    found: dict[int, ir.Value] = {}
    tensor = constant.tensor
    if tensor is None or not tensor.dtype.is_integer():
        return []
    waiting, seen = list(constant.readers), set[tuple[int, int]]()
    for node, index in waiting:  # it grows
        if (id(node), index) in seen:
            continue
        seen.add((id(node), index))
        if node.domain not in STANDARD | RUNTIMES:
            continue
        for place in PARTS.get(node.op_type, {}).get(index, ()):
            operand = node.inputs[place] if place is not None and place < len(node.inputs) else None
            found.update((id(v), v) for v in _constants_of(operand, known))
        if node.op_type in MOVES:
            waiting += node.outputs[0].uses()
            if node.op_type == "Cast":
                found.update((id(v), v) for v in _factors(node.outputs[0], known))
        elif node.op_type in PRODUCTS:
            found.update((id(v), v) for v in _product_scale(node, known))
    return list(found.values())


def _factors(value: ir.Value, known: dict[int, Constant], depth: int = 3) -> Iterator[ir.Value]:
    """The constants that a value is multiplied with, also behind a change of shape."""
    for user, _ in value.uses():
        if user.op_type == "Mul":
            yield from (c for v in user.inputs if v is not value for c in _constants_of(v, known))
        elif user.op_type in MOVES and depth:
            yield from _factors(user.outputs[0], known, depth - 1)


def _product_scale(node: ir.Node, known: dict[int, Constant]) -> Iterator[ir.Value]:
    """What an integer product is multiplied with: the weight's scale, alone or times the input's."""
    for cast in (user for user, _ in node.outputs[0].uses() if user.op_type == "Cast"):
        for scaled in (user for user, _ in cast.outputs[0].uses() if user.op_type == "Mul"):
            for value in (v for v in scaled.inputs if v is not None and v is not cast.outputs[0]):
                yield from _constants_of(value, known)
                inner = value.producer()
                if inner is not None and inner.op_type == "Mul":
                    yield from (c for v in inner.inputs for c in _constants_of(v, known))


def _constants_of(value: ir.Value | None, known: dict[int, Constant]) -> Iterator[ir.Value]:
    """A constant, also one that a Cast or a Reshape stands before."""
    while value is not None and id(value) not in known:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in ("Cast", "Reshape") else None
    if value is not None:
        yield value
