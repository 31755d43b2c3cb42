"""A layer that was left in float, kept from ONNX Runtime's own quantizer.

Where a float weight meets integers on both sides, DequantizeLinear → Conv, ConvTranspose, Gemm → QuantizeLinear, ORT (1.22 and later)
rounds it to 8 bits when it loads the file, with one scale for the whole tensor: the layer that a rule left in float because it cannot
bear rounding is rounded worst of all. So the pattern is broken where that changes no number:

    DequantizeLinear → Conv   →   DequantizeLinear → Clip(its smallest value, its largest) → Conv        with a float weight
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant

LAYERS = {"Conv", "ConvTranspose", "Gemm"}  # of which ORT rounds weights


class KeepFloatPass(ir.passes.InPlacePass):
    """Insert the Clip before every such layer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        found = [node for node in model.graph if node.op_type in LAYERS and _would_be_rounded(node)]
        for node in found:
            _guard(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(found))


def _would_be_rounded(node: ir.Node) -> bool:
    source, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
    if source is None or source.op_type != "DequantizeLinear" or (weight is not None and weight.op_type == "DequantizeLinear"):
        return False
    fixed = all(v is not None and v.const_value is not None and v.const_value.size == 1 for v in source.inputs[1:])
    return fixed and len(source.inputs) == 3 and reaches_quantize(node.outputs[0])


def reaches_quantize(value: ir.Value) -> bool:
    """True where some reader of a value rounds it, after an activation or at once."""
    users = [user for user, _ in value.uses()]
    return any(u.op_type == "QuantizeLinear" or (u.op_type in ("Relu", "Clip") and reaches_quantize(u.outputs[0])) for u in users)


def _guard(graph: ir.Graph, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None
    source = x.producer()
    assert source is not None
    scale, zero = (v.const_value.numpy().reshape(()) for v in source.inputs[1:])  # type: ignore[union-attr]
    ends = np.iinfo(zero.dtype)
    low, high = ((np.float32(end) - np.float32(zero)) * np.float32(scale) for end in (ends.min, ends.max))
    name = f"{node.outputs[0].name}_input"
    bounds = [constant(graph, f"{name}_{end}", np.array(v, dtype=np.float32)) for end, v in (("low", low), ("high", high))]
    clip = ir.Node("", "Clip", [x, *bounds])
    clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].type = name, x.shape, x.type
    graph.insert_before(node, clip)
    node.replace_input_with(0, clip.outputs[0])
