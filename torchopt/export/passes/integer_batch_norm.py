"""Batch norm that nothing can absorb (after a concatenation, as in DenseNet), as an integer depthwise convolution.

    y = a·x + c  per channel      a = γ / √(σ² + ε),  c = β − a·μ
      = Conv 1×1, one group a channel, weight ŵ = s·q with q = ±64 and s = |a| / 64

A division by a power of two is exact, so that the integer weight is a bit for bit; the bias c, which the runtime rounds to s_x·s, is
off by 1/128 of an input step at most.

1. DequantizeLinear → BatchNormalization → QuantizeLinear (any number of them)   → DequantizeLinear → Conv → QuantizeLinear
2. a bias that does not fit into 32 bits on that grid, or anything else          → left as it is
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant

CODE = 64
LARGEST_BIAS = 2**30


class IntegerBatchNormPass(ir.passes.InPlacePass):
    """Cases 1 and 2 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every BatchNormalization of `model` that stands between integers."""
        modified = False
        for node in [n for n in model.graph if n.op_type == "BatchNormalization" and _is_between_integers(n)]:
            modified |= _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _is_between_integers(node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    source = x.producer() if x is not None else None
    if x is None or source is None or source.op_type != "DequantizeLinear" or x.shape is None or len(x.shape) < 3:
        return False
    scale = source.inputs[1]
    known = scale is not None and scale.const_value is not None and scale.const_value.size == 1
    known = known and all(v is not None and v.const_value is not None for v in node.inputs[1:5])
    users = [user for user, _ in y.uses()]
    return known and bool(users) and not y.is_graph_output() and all(u.op_type == "QuantizeLinear" for u in users)


def affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Return a and c, float32 of shape (channels,)."""
    gamma, beta, mean, variance = (v.const_value.numpy().astype(np.float64) for v in node.inputs[1:5])  # type: ignore[union-attr]
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    a = gamma / np.sqrt(variance + epsilon)
    return a.astype(np.float32), (beta - mean * a).astype(np.float32)


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None
    assert x.shape is not None
    source = x.producer()
    assert source is not None
    step = float(source.inputs[1].const_value.numpy().reshape(()))  # type: ignore[union-attr]
    a, c = affine(node)
    scale = np.where(a == 0, np.maximum(np.abs(c), 1) / (step * 2**20), np.abs(a) / CODE).astype(np.float32)
    codes = (np.sign(a) * CODE).astype(np.int8)
    if not np.array_equal(codes * scale, a) or float(np.abs(c / (step * scale.astype(np.float64))).max()) > LARGEST_BIAS:
        return False
    name, channels = str(old.name), len(a)
    weight = constant(graph, f"{name}_weight", codes.reshape(channels, *[1] * (len(x.shape) - 1)))
    scales = constant(graph, f"{name}_weight_scale", scale)
    bias = constant(graph, f"{name}_bias", c)
    floats = ir.Node("", "DequantizeLinear", [weight, scales], [ir.AttrInt64("axis", 0)])
    conv = ir.Node("", "Conv", [x, floats.outputs[0], bias], [ir.AttrInt64("group", channels)])
    floats.outputs[0].name, floats.outputs[0].dtype = f"{name}_weight_float", ir.DataType.FLOAT
    conv.outputs[0].name, conv.outputs[0].type, conv.outputs[0].shape = f"{name}_conv", old.type, old.shape
    graph.insert_before(node, [floats, conv])
    for user, index in list(old.uses()):
        user.replace_input_with(index, conv.outputs[0])
    graph.remove(node, safe=True)
    return True
