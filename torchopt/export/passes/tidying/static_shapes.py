"""Shapes that depend on nothing but the batch, written as constants.

A traced `x.view(n, 8, -1)` or `flatten(x, 1)` asks for the batch size with Shape, Squeeze and Concat at each inference. ONNX's Reshape
needs none of it: 0 copies a dimension and −1 infers one.

1. Reshape to a computed shape with one free dimension, which stands at the same place in the input  → constant, 0 there
2. the same, at another place (heads or windows moved into the batch)                             → constant, −1 there
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant


class StaticShapesPass(ir.passes.InPlacePass):
    """Cases 1 and 2 of the module's docstring; the nodes that computed the shape are left for `TidyPass`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Reshape of `model` whose shape is computed but known."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Reshape" and node.inputs[1] is not None and node.inputs[1].const_value is None:
                shape = _constant_shape(node)
                if shape is not None:
                    name = f"{node.outputs[0].name}_shape"
                    node.replace_input_with(1, constant(model.graph, name, np.array(shape, dtype=np.int64)))
                    node.attributes.pop("allowzero", None)  # 0 is to mean "as in the input"
                    modified = True
        return ir.passes.PassResult(model, modified=modified)


def _constant_shape(node: ir.Node) -> list[int] | None:
    x, target = node.inputs[0], node.outputs[0].shape
    if x is None or target is None:
        return None
    free = [i for i, size in enumerate(target) if not isinstance(size, int)]
    if len(free) != 1 or any(isinstance(size, int) and size == 0 for size in target):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in target]
    at = free[0]
    if x.shape is not None and at < len(x.shape) and x.shape[at] == target[at] and str(target[at]) != "None":
        sizes[at] = 0
    return sizes
