"""Two roundings one after another, kept two.

A value that is rounded to one grid, and then to another, is another number than one that is rounded to the second at once. ONNX Runtime
makes one rounding of two that follow directly, each with one reader (its DoubleQDQPairsRemover), on a grid that it computes from both:

    QuantizeLinear(a) → DequantizeLinear(a) → QuantizeLinear(b)   →   …(a) → DequantizeLinear(a) → Max(its smallest value) → …(b)

The Max changes no number, and keeps the two apart. A rounding to the same grid again needs none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant


class KeepApartPass(ir.passes.InPlacePass):
    """Insert the Max between every such pair."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        found = [node for node in model.graph if node.op_type == "QuantizeLinear" and _follows_another(node)]
        for node in found:
            keep_apart(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(found))


def _follows_another(quantize: ir.Node) -> bool:
    x = quantize.inputs[0]
    before = x.producer() if x is not None else None
    if x is None or before is None or before.op_type != "DequantizeLinear" or len(list(x.uses())) > 1 or x.is_graph_output():
        return False
    grids = [_grid(node) for node in (before, quantize)]
    return grids[0] is not None and grids[0] != grids[1]


def _grid(node: ir.Node) -> tuple[float, int, np.dtype] | None:
    """Scale, zero point and type of a grid with one of each; None where they are not known."""
    values = [v.const_value.numpy() for v in node.inputs[1:3] if v is not None and v.const_value is not None]
    if len(values) < 2 or any(value.size > 1 for value in values):
        return None
    return float(values[0].reshape(())), int(values[1].reshape(())), values[1].dtype


def keep_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Put a Max that changes no number between a DequantizeLinear of one scale and the `node` behind it."""
    x = node.inputs[0]
    assert x is not None
    before = x.producer()
    grid = _grid(before) if before is not None else None
    assert grid is not None
    scale, zero, dtype = grid
    lowest = (np.float32(np.iinfo(dtype).min) - np.float32(zero)) * np.float32(scale)
    name = f"{node.outputs[0].name}_apart"
    between = ir.Node("", "Max", [x, constant(graph, f"{name}_low", np.array(lowest, dtype=np.float32))])
    between.outputs[0].name, between.outputs[0].shape, between.outputs[0].type = name, x.shape, x.type
    graph.insert_before(node, between)
    node.replace_input_with(0, between.outputs[0])
