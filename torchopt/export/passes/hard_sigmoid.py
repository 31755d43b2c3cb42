"""HardSigmoid between integers as an integer addition, which ORT has a kernel for.

    hardsigmoid(x) = clip(α·x + β, 0, 1);  with x = s·(q − z) and a quantizer that saturates at 0 and at 1, the clip is the quantizer's:

    DequantizeLinear(q, s, z) → HardSigmoid → QuantizeLinear   →   DequantizeLinear(q, α·s, z) → Add(β) → QuantizeLinear

β is the one code of a quantized constant of scale β, so that it is exact. All 256 codes are computed both ways: they agree, but for
ties that α·s rounds the other way, by one step.

1. input from DequantizeLinear, every user a saturating QuantizeLinear     → Add; ORT runs QLinearAdd
2. anything else                                                             → left as it is
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant
from torchopt.export.passes.redundant_activations import LIMITS, saturates

TIES = 3  # of 256 codes that may round the other way


class HardSigmoidPass(ir.passes.InPlacePass):
    """Cases 1 and 2 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every HardSigmoid of `model` that stands between integers."""
        found = [node for node in model.graph if node.op_type == "HardSigmoid" and _is_between_integers(node)]
        for node in found:
            _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(found))


def coefficients(node: ir.Node) -> tuple[np.float32, np.float32]:
    """Return α and β."""
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 0.2
    beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 0.5
    return np.float32(alpha), np.float32(beta)


def _is_between_integers(node: ir.Node) -> bool:
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type != "DequantizeLinear" or len(source.inputs) < 3 or node.outputs[0].is_graph_output():
        return False
    _, beta = coefficients(node)
    users = [user for user, _ in node.outputs[0].uses()]
    if not users or beta <= 0 or not all(u.op_type == "QuantizeLinear" and saturates(u, 0.0, 1.0) for u in users):
        return False
    constants = [v.const_value for v in (*source.inputs[1:3], *users[0].inputs[1:3]) if v is not None]
    if any(c is None or c.size != 1 for c in constants):
        return False
    return _agree(node, *(c.numpy().reshape(()) for c in constants if c is not None))


def _agree(node: ir.Node, scale: np.ndarray, zero: np.ndarray, out_scale: np.ndarray, out_zero: np.ndarray) -> bool:
    """True where both forms give the same integer for all codes, but for a few ties."""
    low, high = LIMITS[ir.DataType.from_numpy(zero.dtype)]
    out_low, out_high = LIMITS[ir.DataType.from_numpy(out_zero.dtype)]
    alpha, beta = coefficients(node)
    steps = np.arange(low, high + 1, dtype=np.float32) - zero.astype(np.float32)
    old = np.clip(steps * scale * alpha + beta, 0, 1)
    new = steps * (scale * alpha) + beta
    codes = [np.clip(np.rint(v / out_scale) + out_zero.astype(np.float32), out_low, out_high) for v in (old, new)]
    apart = np.abs(codes[0] - codes[1])
    return bool(apart.max() <= 1 and np.count_nonzero(apart) <= TIES)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None
    source = x.producer()
    assert source is not None
    codes, scale, zero = source.inputs[:3]
    assert scale is not None and scale.const_value is not None and zero is not None and zero.const_value is not None  # noqa: PT018
    alpha, beta = coefficients(node)
    name = str(old.name)
    kind = zero.const_value.numpy().dtype
    scaled = constant(graph, f"{name}_scale", (scale.const_value.numpy() * alpha).astype(np.float32))
    one = constant(graph, f"{name}_one", np.array(1, dtype=kind))
    none = constant(graph, f"{name}_none", np.array(0, dtype=kind))
    beta_scale = constant(graph, f"{name}_beta", np.array(beta, dtype=np.float32))
    slope = ir.Node("", "DequantizeLinear", [codes, scaled, zero])
    offset = ir.Node("", "DequantizeLinear", [one, beta_scale, none])
    total = ir.Node("", "Add", [slope.outputs[0], offset.outputs[0]])
    for new, suffix in ((slope, "slope"), (offset, "offset"), (total, "sum")):
        new.outputs[0].name, new.outputs[0].type = f"{name}_{suffix}", old.type
    slope.outputs[0].shape = total.outputs[0].shape = old.shape
    graph.insert_before(node, [slope, offset, total])
    for user, index in list(old.uses()):
        user.replace_input_with(index, total.outputs[0])
    graph.remove(node, safe=True)
