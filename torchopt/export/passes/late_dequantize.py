"""Data that only moves, moved as integers: DequantizeLinear goes behind what does not compute.

    f(DQ(q)) = DQ(f(q))  exactly, when f only moves elements and DQ has one scale

1. DequantizeLinear → Reshape, Flatten, Transpose, Squeeze, Unsqueeze → X      →  the same on integers → DequantizeLinear → X
2. the DequantizeLinear has other users too                                     →  a second one, behind the move
3. Pad with zeros, or with values of the tensor (reflect, edge, wrap)           →  as case 1, zeros as the zero point

Without it ORT finds a float tensor at the input of a Gemm after `flatten`, or of a Conv with `padding_mode="reflect"`, and runs it in
float.
"""

from __future__ import annotations

import onnx_ir as ir

MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Pad"}


class LateDequantizePass(ir.passes.InPlacePass):
    """Cases 1 to 3 of the module's docstring; activations only, since a weight keeps its DequantizeLinear beside it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move every DequantizeLinear of an activation behind the moves that follow it."""
        modified = False
        for node in list(model.graph):
            if node.op_type in MOVES and _movable(node):
                _swap(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _movable(move: ir.Node) -> bool:
    source = move.inputs[0].producer() if move.inputs[0] is not None else None
    if source is None or source.op_type != "DequantizeLinear" or move.outputs[0].is_graph_output():
        return False
    codes, scale = source.inputs[0], source.inputs[1]
    is_activation = codes is not None and codes.producer() is not None
    one_scale = scale is not None and scale.const_value is not None and scale.const_value.size == 1
    return is_activation and one_scale and (move.op_type != "Pad" or pads_on_the_grid(move))


def pads_on_the_grid(pad: ir.Node) -> bool:
    """True where what is added is on the grid: zeros, or other elements."""
    mode, value = pad.attributes.get("mode"), pad.inputs[2] if len(pad.inputs) > 2 else None
    zeros = value is None or (value.const_value is not None and not value.const_value.numpy().any())
    return zeros or (mode is not None and mode.as_string() != "constant")


def _swap(graph: ir.Graph, move: ir.Node) -> None:
    assert move.inputs[0] is not None
    dequantize = move.inputs[0].producer()
    assert dequantize is not None
    assert dequantize.inputs[0] is not None
    moved = move.outputs[0]
    users = list(moved.uses())
    move.replace_input_with(0, dequantize.inputs[0])
    if move.op_type == "Pad" and len(dequantize.inputs) > 2:
        _pad_with(move, dequantize.inputs[2])
    behind = ir.Node("", "DequantizeLinear", [moved, *dequantize.inputs[1:]], list(dequantize.attributes.values()))
    output = behind.outputs[0]
    output.name, output.shape, output.type = f"{moved.name}_dq", moved.shape, moved.type
    moved.type = dequantize.inputs[0].type
    graph.insert_after(move, behind)
    for user, index in users:
        user.replace_input_with(index, output)


def _pad_with(pad: ir.Node, value: ir.Value | None) -> None:
    """Let a Pad add the zero point, which is the integer of zero."""
    if len(pad.inputs) < 3:
        pad.resize_inputs(3)
    pad.replace_input_with(2, value)
