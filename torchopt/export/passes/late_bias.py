"""Biases that keep an integer product from its kernel, written so that they do not.

1. The last linear layer. ORT runs DequantizeLinear → Gemm as one integer kernel (QGemm) with a float result when the Gemm has no bias, or
   an integer one; with a float bias and no QuantizeLinear behind it, the Gemm runs in float. So the bias moves out, where it stays the
   float that it is:      Gemm(DQ(x), DQ(w), b)  →  Add(Gemm(DQ(x), DQ(w)), b)      when nothing rounds the result

2. Products of tensors with more than two dimensions, all known. ORT makes Reshape, Gemm, Reshape of MatMul and Add before it looks for
   integers, and the Gemm runs in float, its weight decoded at each inference (50 rows, 256 → 512: 270 µs, 27 µs as integers). It does
   not with a bias of three dimensions:      Add(MatMul(DQ(x), DQ(w)), b: (N))  →  the same with b: (1, 1, N)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant


class LateBiasPass(ir.passes.InPlacePass):
    """Cases 1 and 2 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        modified = False
        fixed = all(isinstance(size, int) for value in model.graph.inputs for size in value.shape or (None,))
        for node in list(model.graph):
            if node.op_type == "Gemm" and len(node.inputs) == 3 and _integer_in_float_out(node):
                _split(model.graph, node)
                modified = True
            elif fixed and node.op_type == "MatMul" and all(map(_is_dequantized, node.inputs)):
                modified |= _raise(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _is_dequantized(value: ir.Value | None) -> bool:
    """True for floats that integers stand for, transposed or not."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        return _is_dequantized(node.inputs[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _integer_in_float_out(gemm: ir.Node) -> bool:
    integer = all(map(_is_dequantized, gemm.inputs[:2]))
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


def _raise(graph: ir.Graph, product: ir.Node) -> bool:
    """Give the bias behind a product two dimensions of one more."""
    users = [user for user, _ in product.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add" or product.outputs[0].is_graph_output():
        return False
    for index, bias in enumerate(users[0].inputs):
        if bias is not None and bias.is_initializer() and bias.const_value is not None and len(bias.const_value.shape) == 1:
            wide = bias.const_value.numpy().astype(np.float32)[None, None]
            users[0].replace_input_with(index, constant(graph, f"{product.outputs[0].name}_bias", wide))
            return True
    return False
