"""Weights whose values are float16 numbers, written as float16.

    float32 initializer w with  float32(float16(w)) = w  bit for bit   →   float16 initializer → Cast to float32

ORT folds the Cast when it loads the file, so that half the bytes cost nothing at inference. A model given in half precision
(`model.half()`) is exported in float32 and comes out here as it was.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant

LARGEST = 65504.0  # of float16
SMALLEST = 64  # elements: below it the Cast node is larger than what it saves


class HalfWeightsPass(ir.passes.InPlacePass):
    """Replace float32 weights whose every value is a float16 number; biases and norms, of one dimension, stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every such initializer of `model`."""
        found = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and _fits(v)]
        for value in found:
            _replace(model.graph, value)
        return ir.passes.PassResult(model, modified=bool(found))


def held(array: np.ndarray) -> np.ndarray:
    """Return a float32 array as files hold it: as float16 where that is the same bits.

    Example:
        >>> held(np.ones((8, 8), np.float32)).dtype, held(np.full((8, 8), 0.1, np.float32)).dtype
        (dtype('float16'), dtype('float32'))
    """
    vector = array.size == max(array.shape, default=0)  # a bias, or a scale in a shape that broadcasts
    if array.ndim < 2 or vector or array.size < SMALLEST or not float(np.abs(array).max()) <= LARGEST:
        return array
    half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32).view(np.int32), array.view(np.int32)) else array


def _fits(value: ir.Value) -> bool:
    if value.const_value is None or value.is_graph_output() or value.is_graph_input() or not list(value.uses()):
        return False
    return held(np.ascontiguousarray(value.const_value.numpy())).dtype == np.float16


def _replace(graph: ir.Graph, value: ir.Value) -> None:
    assert value.const_value is not None
    half = value.const_value.numpy().astype(np.float16)
    name, users = str(value.name), list(value.uses())
    graph.initializers.pop(name)
    value.name = f"{name}_float"
    new = constant(graph, name, half)
    cast = ir.Node("", "Cast", [new], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    output = cast.outputs[0]
    output.name, output.shape, output.dtype = f"{name}_float32", ir.Shape(half.shape), ir.DataType.FLOAT
    graph.insert_before(next(iter(graph)), cast)
    for user, index in users:
        user.replace_input_with(index, output)
