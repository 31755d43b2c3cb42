"""Weights that lie on an integer grid, written as integers.

    float32 initializer ŵ   →   int8 initializer q  →  DequantizeLinear(q, s, axis)  =  q · s  =  ŵ

The initializer keeps its name, so that the file speaks of the weight as torch does. ORT fuses the DequantizeLinear into its
integer kernels; a float32 initializer with a QuantizeLinear, which exporters write, would be four times as large. Its integer Gemm
wants a zero point to be written, which convolutions and MatMul do without.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from torchopt.errors import ModelError
from torchopt.export.passes.constants import constant
from torchopt.grid import Grid


class IntegerWeightsPass(ir.passes.InPlacePass):
    """Replace float weights by integers and a DequantizeLinear.

    Args:
        grids: the grid of each weight, by initializer name (`torchopt.grid.grids(model)`).

    Raises:
        ModelError: the integers do not give back the floats bit for bit.
    """

    def __init__(self, grids: Mapping[str, Grid]) -> None:
        super().__init__()
        self.grids = grids

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every initializer that has a grid."""
        found = [name for name in self.grids if name in model.graph.initializers and model.graph.initializers[name].uses()]
        for name in found:
            _replace(model.graph, model.graph.initializers[name], self.grids[name])
        return ir.passes.PassResult(model, modified=bool(found))


def integers(value: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the int8 codes and the float32 scale of `value`, proven to multiply back to it.

    Raises:
        ModelError: they do not.
    """
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
    operands = [constant(graph, name, codes), constant(graph, name + "_scale", scale)]
    if any(user.op_type == "Gemm" for user, _ in users):
        operands.append(constant(graph, name + "_zero", np.zeros(scale.shape, dtype=np.int8)))
    attributes = [ir.AttrInt64("axis", grid.axis)] if grid.axis is not None else []
    node = ir.Node("", "DequantizeLinear", operands, attributes, name=name + "_dequantize")
    output = node.outputs[0]
    output.name, output.shape, output.dtype = name + "_dq", ir.Shape(codes.shape), ir.DataType.FLOAT
    graph.insert_before(users[0][0], node)
    for user, index in users:
        user.replace_input_with(index, output)
    graph.sort()
