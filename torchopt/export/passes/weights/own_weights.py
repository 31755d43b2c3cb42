"""A weight that several products read, dequantized for each of them: ORT fuses a DequantizeLinear into the one product that reads it.

    q → DequantizeLinear → Transpose → MatMul, MatMul   →   q → DequantizeLinear → Transpose → MatMul, and again for the other

Cross-attention projects its queries and its keys with one matrix; shared, both products would run in float. The integers are stored once.
"""

from __future__ import annotations

import onnx_ir as ir


class OwnWeightsPass(ir.passes.InPlacePass):
    """Rewrite every such weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        shared = [node for node in model.graph if node.op_type == "DequantizeLinear" and _is_shared_weight(node)]
        for node in shared:
            for number, (product, index) in enumerate(_products(node)[1:]):
                product.replace_input_with(index, _again(model.graph, product.inputs[index], number))
        model.graph.sort()
        return ir.passes.PassResult(model, modified=bool(shared))


def _is_shared_weight(node: ir.Node) -> bool:
    codes = node.inputs[0]
    return codes is not None and codes.is_initializer() and len(_products(node)) > 1


def _products(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The products that read a dequantized weight, transposed or not, and where; none where something else reads it."""
    found: list[tuple[ir.Node, int]] = []
    for user, index in node.outputs[0].uses():
        found += list(user.outputs[0].uses()) if user.op_type == "Transpose" else [(user, index)]
    return found if all(user.op_type in ("MatMul", "Gemm", "Conv") for user, _ in found) else []


def _again(graph: ir.Graph, value: ir.Value | None, number: int) -> ir.Value:
    """A second chain of nodes that gives the same value."""
    assert value is not None
    node = value.producer()
    if node is None:
        return value
    inputs = [_again(graph, node.inputs[0], number), *node.inputs[1:]]
    twin = ir.Node("", node.op_type, inputs, list(node.attributes.values()))
    output = twin.outputs[0]
    output.name, output.shape, output.type = f"{value.name}_again_{number}", value.shape, value.type
    graph.insert_after(node, twin)
    return output
