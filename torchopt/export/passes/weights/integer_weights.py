"""Weights that lie on an integer grid, written as integers.

    float32 initializer ŵ   →   int8 initializer q  →  DequantizeLinear(q, s, axis)  =  q · s  =  ŵ      where integers are multiplied
                            →   int8 initializer q  →  Cast  →  Mul(s)               =  q · s  =  ŵ      where floats are

The initializer keeps its name, so that the file speaks of the weight as torch does. ORT fuses the DequantizeLinear into its
integer kernels; a float32 initializer with a QuantizeLinear, which exporters write, would be four times as large. Its integer Gemm
wants a zero point to be written, which convolutions and MatMul do without. Where the other operand is float, ORT has no kernel to
fuse it into and runs the DequantizeLinear at each inference (14 times slower than float for one row through a 512 × 256 layer);
Cast and Mul it folds when it loads the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from torchopt.errors import ModelError
from torchopt.export.passes.constants import constant
from torchopt.export.passes.late_dequantize import pads_on_the_grid
from torchopt.export.passes.weights.integer_transposed import can_be_integer
from torchopt.network.grid import Grid

MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Relu", "Clip"}


class IntegerWeightsPass(ir.passes.InPlacePass):
    """Replace float weights by integers and a DequantizeLinear.

    Args:
        grids: the grid of each weight, by initializer name (`torchopt.network.grid.grids(model)`).

    Raises:
        ModelError: the integers do not give back the floats bit for bit.
    """

    def __init__(self, grids: Mapping[str, Grid]) -> None:
        super().__init__()
        self.grids = grids

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every initializer that has a grid."""
        known = model.graph.initializers
        found = [n for n in self.grids if n in known and known[n].uses() and known[n].dtype == ir.DataType.FLOAT]
        for name in found:
            _replace(model.graph, known[name], self.grids[name])
        return ir.passes.PassResult(model, modified=bool(found))


def integers(value: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the int8 codes and the float32 scale of `value`, proven to multiply back to it.

    Raises:
        ModelError: they do not.
    """
    kinds = {str(value.dtype), str(grid.scale.dtype).removeprefix("torch.")} - {"float32"}
    if kinds:
        raise ModelError(
            f"export: {grid.name} was made {kinds.pop()} after finalize, and its integers are of float32 values; export the model as "
            "finalize gave it, or quantize with mode='float16'"
        )
    scale = grid.scale.detach().cpu().numpy().astype(np.float32)
    spread = grid.broadcast(value.ndim).detach().cpu().numpy().astype(np.float32)
    codes = np.rint(value / spread)
    if np.abs(codes).max(initial=0) > 128 or not np.array_equal(codes.astype(np.float32) * spread, value):
        raise ModelError(f"export: {grid.name} is not on the integer grid it claims; finalize the model again")
    return codes.astype(np.int8), scale


def _replace(graph: ir.Graph, weight: ir.Value, grid: Grid) -> None:
    assert weight.const_value is not None
    codes, scale = integers(weight.const_value.numpy(), grid)
    name, users = str(weight.name), list(weight.uses())
    graph.initializers.pop(name)
    weight.name = name + "_float"
    stored = constant(graph, name, codes)
    for integer in (True, False):
        readers = [(user, i) for user, i in users if (grid.block is None and meets_integers(user)) is integer]
        if not readers:
            continue
        if integer:
            output = _dequantized(graph, stored, scale, grid.axis, any(user.op_type == "Gemm" for user, _ in readers))
        elif grid.block is not None:
            output = _multiplied_in_blocks(graph, stored, scale, grid.block)
        else:
            output = _multiplied(graph, stored, grid.broadcast(codes.ndim).detach().cpu().numpy().astype(np.float32))
        output.name, output.shape, output.dtype = f"{name}_{integer:d}", ir.Shape(codes.shape), ir.DataType.FLOAT
        for user, index in readers:
            user.replace_input_with(index, output)
    graph.sort()


def meets_integers(user: ir.Node) -> bool:
    """True where the user of a weight is what ORT has an integer kernel for: the other operand has 8 bits, a convolution's result too."""
    if user.op_type in ("Transpose", "Reshape"):
        return any(meets_integers(reader) for reader, _ in user.outputs[0].uses())
    if user.op_type == "Conv":
        return _is_integer(user.inputs[0]) and _is_rounded(user.outputs[0])
    if user.op_type == "ConvTranspose":
        return _is_integer(user.inputs[0]) and can_be_integer(user)
    return user.op_type in ("Gemm", "MatMul") and _is_integer(user.inputs[0])


def _is_rounded(value: ir.Value) -> bool:
    """True where everybody reads a value rounded, after an activation or at once."""
    users = [user for user, _ in value.uses()]
    return bool(users) and all(
        user.op_type == "QuantizeLinear" or (user.op_type in ("Relu", "Clip") and _is_rounded(user.outputs[0])) for user in users
    )


def _is_integer(value: ir.Value | None) -> bool:
    """True for what a DequantizeLinear of 8-bit integers gives, moved or not."""
    node = value.producer() if value is not None else None
    while node is not None and (node.op_type in MOVES or (node.op_type == "Pad" and pads_on_the_grid(node))):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    return node.inputs[0].dtype in (ir.DataType.UINT8, ir.DataType.INT8)


def _dequantized(graph: ir.Graph, codes: ir.Value, scale: np.ndarray, axis: int | None, zero: bool) -> ir.Value:
    operands = [codes, constant(graph, f"{codes.name}_steps", scale)]
    if zero:
        operands.append(constant(graph, f"{codes.name}_zero", np.zeros(scale.shape, dtype=np.int8)))
    attributes = [ir.AttrInt64("axis", axis)] if axis is not None else []
    node = ir.Node("", "DequantizeLinear", operands, attributes, name=f"{codes.name}_dequantize")
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _multiplied(graph: ir.Graph, codes: ir.Value, scale: np.ndarray) -> ir.Value:
    cast = ir.Node("", "Cast", [codes], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    cast.outputs[0].name = f"{codes.name}_cast"
    node = ir.Node("", "Mul", [cast.outputs[0], constant(graph, f"{codes.name}_scale", scale)])
    graph.insert_before(graph[0], [cast, node])
    return node.outputs[0]


def _multiplied_in_blocks(graph: ir.Graph, codes: ir.Value, scale: np.ndarray, block: int) -> ir.Value:
    """The same with a scale a block: the weight is seen as (outputs, blocks, inputs of a block) meanwhile."""
    name, (outputs, blocks) = codes.name, scale.shape
    apart = constant(graph, f"{name}_blocks", np.array([outputs, blocks, block]))
    whole = constant(graph, f"{name}_shape", np.array([outputs, blocks * block]))
    before = ir.Node("", "Reshape", [codes, apart])
    before.outputs[0].name = f"{name}_apart"
    product = _multiplied(graph, before.outputs[0], scale[:, :, None])
    product.name = f"{name}_product"
    after = ir.Node("", "Reshape", [product, whole])
    graph.insert_before(graph[0], [before, after])
    return after.outputs[0]
