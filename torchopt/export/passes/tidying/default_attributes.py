"""Attributes that say what an operator does anyway, which exporters write out: a convolution's take 100 bytes.

Defaults are those of ONNX's own definition of the operator; for convolutions and pools it gives them in words: strides and dilations
of one, pads of zero.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

IN_WORDS = {"strides": 1, "dilations": 1, "pads": 0}  # along each axis
OF = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool"}


class DefaultAttributesPass(ir.passes.InPlacePass):
    """Drop the attributes of standard operators that have their default value."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drop them from the nodes of the main graph of `model`."""
        opset, modified = model.opset_imports.get("", 0), False
        for node in model.graph:
            if node.domain == "":
                for name in [a.name for a in node.attributes.values() if _is_default(node, a, opset)]:
                    node.attributes.pop(name)
                    modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_default(node: ir.Node, attribute: ir.Attr, opset: int) -> bool:
    if attribute.is_ref():
        return False
    if node.op_type in OF and attribute.name in IN_WORDS:
        return set(attribute.as_ints()) == {IN_WORDS[attribute.name]}
    try:
        default = onnx.defs.get_schema(node.op_type, opset).attributes[attribute.name].default_value
    except (onnx.defs.SchemaError, KeyError):  # an operator or attribute of a runtime's own
        return False
    if default.type in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT, onnx.AttributeProto.STRING):
        value = onnx.helper.get_attribute_value(default)
        return attribute.value == (value.decode() if isinstance(value, bytes) else value)
    return False
