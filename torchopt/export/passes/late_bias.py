"""The last linear layer's bias, added after its integer product.

ORT runs DequantizeLinear → Gemm as one integer kernel (QGemm) with a float result when the Gemm has no bias, or an integer one; with
a float bias and no QuantizeLinear behind it, the Gemm runs in float. So the bias moves out, where it stays the float that it is:

    Gemm(DQ(x), DQ(w), b)  →  Add(Gemm(DQ(x), DQ(w)), b)      when nothing rounds the result
"""

from __future__ import annotations

import onnx_ir as ir


class LateBiasPass(ir.passes.InPlacePass):
    """Split the bias off every integer Gemm whose result stays float."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite each such Gemm to Gemm and Add."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Gemm" and len(node.inputs) == 3 and _integer_in_float_out(node):
                _split(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _integer_in_float_out(gemm: ir.Node) -> bool:
    sources = [v.producer() if v is not None else None for v in gemm.inputs[:2]]
    integer = all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    bias = gemm.inputs[2]
    factor = gemm.attributes.get("beta")
    plain = factor is None or factor.as_float() == 1.0
    is_float = bias is not None and bias.is_initializer()
    rounded = any(user.op_type == "QuantizeLinear" for user, _ in gemm.outputs[0].uses())
    return integer and plain and is_float and not rounded


def _split(graph: ir.Graph, gemm: ir.Node) -> None:
    result, bias = gemm.outputs[0], gemm.inputs[2]
    gemm.resize_inputs(2)
    add = ir.Node("", "Add", [result, bias])
    total = add.outputs[0]
    total.shape, total.type = result.shape, result.type
    name, result.name = result.name, f"{result.name}_product"
    total.name = name
    graph.insert_after(gemm, add)
    for user, index in list(result.uses()):
        if user is not add:
            user.replace_input_with(index, total)
    for index, output in enumerate(graph.outputs):
        if output is result:
            graph.outputs[index] = total
