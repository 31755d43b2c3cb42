"""What a call that decodes packed weights is, to rooms that only look at files: a weight or the codes of several, and its bytes."""

from __future__ import annotations

import math

import onnx_ir as ir

from torchopt.codecs.encoding import DOMAIN


def gives_weight(node: ir.Node) -> bool:
    """Whether a node is a call that gives a weight; one whose codes other calls cut weights out of is none."""
    return node.domain == DOMAIN and len(node.outputs) == 1 and all(user.domain != DOMAIN for user, _ in node.outputs[0].uses())


def bytes_of_call(node: ir.Node) -> int:
    """Return the bytes of everything that a call reads; of codes that are shared, its share."""
    shared = [v.producer() for v in node.inputs if v is not None]
    return _constants(node) + sum(
        round(_constants(codes) * _elements(node) / max(1, _elements(codes)))
        for codes in shared
        if codes is not None and codes.domain == DOMAIN
    )


def _constants(node: ir.Node) -> int:
    return sum(v.const_value.nbytes for v in node.inputs if v is not None and v.const_value is not None)


def _elements(node: ir.Node) -> int:
    """Elements of the tensor that a call gives."""
    shape = node.attributes.get("d")
    return math.prod(shape.as_ints()) if shape is not None and shape.type == ir.AttributeType.INTS else 0
