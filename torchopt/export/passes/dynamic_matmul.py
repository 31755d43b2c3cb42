"""Linear layers whose input is rounded at run time, as products of integers.

    x → DynamicQuantizeLinear → (q, s, z) → DequantizeLinear → Gemm or MatMul(Transpose) with DequantizeLinear(w, t)
      →  MatMulInteger(q, wᵀ, z) → Cast → Mul(s · t)  [→ Add(bias)]

    (q − z)·s  ×  w·t  =  ((q − z) × w) · (s · t)        the same numbers, summed exactly

ORT fuses the new form to DynamicQuantizeMatMul, or to MatMulIntegerToFloat where several layers read one rounded tensor; the old one it
would run in float. The weight stays where torch has it, (outputs, inputs): ORT transposes constants when it loads a file.
"""

from __future__ import annotations

import onnx_ir as ir

from torchopt.export.passes.weights.block_weights import is_plain_gemm


class DynamicMatMulPass(ir.passes.InPlacePass):
    """Rewrite every product of a dynamically quantized tensor with an integer weight."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        modified = False
        for node in list(model.graph):
            source, weight = _dynamic(node), _weight(node)
            if source is not None and weight is not None:
                _rewrite(model.graph, node, source, weight)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _dynamic(node: ir.Node) -> ir.Node | None:
    """The DynamicQuantizeLinear whose values a product reads, or None."""
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    dequantize = _producer(node.inputs[0], "DequantizeLinear")
    return _producer(dequantize.inputs[0], "DynamicQuantizeLinear") if dequantize is not None else None


def _weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a weight (outputs, inputs) that a product reads transposed, or None."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type == "Gemm":
        if not is_plain_gemm(node):
            return None
    else:
        transpose = _producer(value, "Transpose")
        if transpose is None:
            return None
        value = transpose.inputs[0]
    found = _producer(value, "DequantizeLinear")
    codes = found.inputs[0] if found is not None else None
    return found if codes is not None and codes.is_initializer() and len(codes.shape or ()) == 2 else None


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _rewrite(graph: ir.Graph, product: ir.Node, source: ir.Node, weight: ir.Node) -> None:
    codes, step, zero = source.outputs
    transpose = ir.Node("", "Transpose", [weight.inputs[0]], [ir.AttrInt64s("perm", [1, 0])])
    sums = ir.Node("", "MatMulInteger", [codes, transpose.outputs[0], zero])
    cast = ir.Node("", "Cast", sums.outputs, [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    factor = ir.Node("", "Mul", [step, weight.inputs[1]])
    new = [transpose, sums, cast, factor, ir.Node("", "Mul", [cast.outputs[0], factor.outputs[0]])]
    if product.op_type == "Gemm" and len(product.inputs) == 3:
        new.append(ir.Node("", "Add", [new[-1].outputs[0], product.inputs[2]]))
    for i, node in enumerate(new):
        node.outputs[0].name = f"{product.outputs[0].name}_{i}"
    ir.convenience.replace_nodes_and_values(graph, product, [product], new, product.outputs, new[-1].outputs)
