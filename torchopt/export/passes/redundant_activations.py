"""Activations that the quantizer after them repeats: it saturates at the same value.

    Q(x) = clamp(round(x / s) + z, 0, 255) is monotone, so  Q(lo) = 0  and  Q(hi) = 255  give  Q(clip(x, lo, hi)) = Q(x)  for every x.

1. Relu → QuantizeLinear with Q(0) the smallest integer          → QuantizeLinear
2. Clip(lo, hi) → QuantizeLinear with both ends reached          → QuantizeLinear
3. either of them with other users of the activation              → left as it is
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

LIMITS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}


class RedundantActivationsPass(ir.passes.InPlacePass):
    """Cases 1 to 3 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drop every redundant Relu and Clip of `model`."""
        found = [node for node in model.graph if node.op_type in ("Relu", "Clip") and _is_redundant(node)]
        for node in found:
            x = node.inputs[0]
            assert x is not None
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, x)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_redundant(node: ir.Node) -> bool:
    users = list(node.outputs[0].uses())
    if not users or node.outputs[0].is_graph_output() or node.inputs[0] is None:
        return False
    low, high = (0.0, np.inf) if node.op_type == "Relu" else _bounds(node)
    return all(user.op_type == "QuantizeLinear" and saturates(user, low, high) for user, _ in users)


def _bounds(clip: ir.Node) -> tuple[float, float]:
    """The ends of a Clip; NaN where they are not constant."""
    ends = [-np.inf, np.inf]
    for i in (1, 2):
        if len(clip.inputs) > i and clip.inputs[i] is not None:
            value = clip.inputs[i].const_value  # type: ignore[union-attr]
            ends[i - 1] = np.nan if value is None else float(value.numpy())
    return ends[0], ends[1]


def saturates(quantize: ir.Node, low: float, high: float) -> bool:
    """True where every value at or below `low` gives the smallest integer, and every one at or above `high` the largest."""
    constants = [v.const_value if v is not None else None for v in quantize.inputs[1:3]]
    if len(constants) < 2 or constants[0] is None or constants[1] is None or constants[1].dtype not in LIMITS:
        return False
    scale, zero_point = constants[0].numpy().astype(np.float32), constants[1].numpy().astype(np.float32)
    smallest, largest = LIMITS[constants[1].dtype]
    at_low = np.rint(np.float32(low) / scale) + zero_point
    at_high = np.rint(np.float32(high) / scale) + zero_point
    return bool((at_low <= smallest).all() and (at_high >= largest).all())
