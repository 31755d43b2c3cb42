"""The values of the weights in a graph: what stands between an initializer of integers and the float that torch has.

1. q → DequantizeLinear(s)                                     q · s
2. q → Cast → Mul(s)                                           q · s
3. h → Cast                                                    float16 weights
4. q → Transpose → MatMulInteger → Cast → Mul(x_scale · s)     q · s, the weight is (outputs, inputs)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def weight_values(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the value of each initializer of an unpacked graph, integers times their scale, by name."""
    raw = {str(name): v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value is not None}
    values = dict(raw)
    for name in raw:
        for user, index in model.graph.initializers[name].uses():
            if index == 0 and (value := _value(raw[name], user, raw)) is not None:
                values[name] = value
    return values


def _value(stored: np.ndarray, user: ir.Node, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """What an initializer stands for by the node that reads it first, or None where it stands for itself."""
    if user.op_type == "DequantizeLinear":
        return _dequantized(stored, user, raw)
    if user.op_type == "Cast":
        value = stored.astype(ir.DataType(user.attributes["to"].as_int()).numpy())
        scale = _scale(_reader(user, "Mul"), raw) if stored.dtype.kind == "i" else None
        return value if scale is None else value * scale
    product = _reader(user, "MatMulInteger") if user.op_type == "Transpose" else None
    cast = _reader(product, "Cast") if product is not None else None
    scaled = _reader(cast, "Mul") if cast is not None else None
    factors = [v.producer() for v in scaled.inputs if v is not None] if scaled is not None else []
    scale = next((s for f in factors if f is not None and f.op_type == "Mul" and (s := _scale(f, raw)) is not None), None)
    return None if scale is None else stored.astype(np.float32) * (scale[:, None] if scale.ndim else scale)


def _reader(node: ir.Node, kind: str) -> ir.Node | None:
    return next((user for user, _ in node.outputs[0].uses() if user.op_type == kind), None)


def _scale(node: ir.Node | None, raw: dict[str, np.ndarray]) -> np.ndarray | None:
    """The constant operand of a multiplication."""
    operands = [str(v.name) for v in node.inputs if v is not None] if node is not None else []
    return next((raw[name] for name in operands if name in raw), None)


def _dequantized(q: np.ndarray, node: ir.Node, raw: dict[str, np.ndarray]) -> np.ndarray:
    scale, zero_point = (raw[str(v.name)] if v is not None else np.zeros(1, q.dtype) for v in (*node.inputs, None)[1:3])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1

    def spread(array: np.ndarray) -> np.ndarray:
        return array.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]) if array.size > 1 else array.reshape(())

    return (q.astype(np.float32) - spread(zero_point).astype(np.float32)) * spread(scale)
