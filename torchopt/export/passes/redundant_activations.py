"""Activations that the quantizer after them repeats: it saturates at the same value.

    Q(x) = clamp(round(x / s) + z, 0, 255) is monotone, so  Q(lo) = 0  and  Q(hi) = 255  give  Q(clip(x, lo, hi)) = Q(x)  for every x.

1. Relu → QuantizeLinear with Q(0) the smallest integer          → QuantizeLinear
2. Clip(lo, hi) → QuantizeLinear with both ends reached          → QuantizeLinear
3. either of them behind an operation on 8-bit integers            → QuantizeLinear → Clip of the integers, from Q(lo) to Q(hi)
4. either of them with other users of the activation              → left as it is

Case 3 keeps a Hardtanh around 0 from making its convolution a float one: no zero point lets both ends saturate when they are ties.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant

LIMITS = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}


class RedundantActivationsPass(ir.passes.InPlacePass):
    """Cases 1 to 4 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Drop every redundant Relu and Clip of `model`, or let it work on integers."""
        found = [node for node in model.graph if node.op_type in ("Relu", "Clip")]
        redundant = [node for node in found if _is_redundant(node)]
        late = [node for node in found if node not in redundant and _may_be_late(node)]
        for node in redundant + late:
            x = node.inputs[0]
            assert x is not None
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, x)
                if node in late:
                    _clip_codes(model.graph, user, *_limits(node))
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(redundant or late))


def _is_redundant(node: ir.Node) -> bool:
    users = list(node.outputs[0].uses())
    if not users or node.outputs[0].is_graph_output() or node.inputs[0] is None:
        return False
    return all(user.op_type == "QuantizeLinear" and saturates(user, *_limits(node)) for user, _ in users)


def _may_be_late(node: ir.Node) -> bool:
    """Case 3."""
    x, result = node.inputs[0], node.outputs[0]
    maker = x.producer() if x is not None else None
    if (
        x is None
        or maker is None
        or not maker.inputs
        or maker.inputs[0] is None
        or len(list(x.uses())) > 1
        or result.is_graph_output()
    ):
        return False
    source = maker.inputs[0].producer()
    grids = [None if user.outputs[0].is_graph_output() else _grid(user) for user, _ in result.uses()]
    eight = all(grid is not None and grid[0].size == 1 and grid[2][1] - grid[2][0] == 255 for grid in grids)
    return (
        bool(grids)
        and eight
        and source is not None
        and source.op_type == "DequantizeLinear"
        and not np.isnan(_limits(node)).any()
    )


def _clip_codes(graph: ir.Graph, quantize: ir.Node, low: float, high: float) -> None:
    """Clip what a QuantizeLinear gives, between the integers of `low` and `high`."""
    grid = _grid(quantize)
    assert grid is not None
    scale, zero_point, limits = grid
    codes, users = quantize.outputs[0], list(quantize.outputs[0].uses())
    ends = np.rint(np.array([low, high], dtype=np.float32) / scale) + zero_point.astype(np.float32)
    ends = np.clip(ends, *limits).astype(zero_point.dtype)
    names = (f"{codes.name}_low", f"{codes.name}_high")
    clip = ir.Node("", "Clip", [codes, *(constant(graph, name, end) for name, end in zip(names, ends, strict=True))])
    clipped = clip.outputs[0]
    clipped.name, clipped.shape, clipped.type = f"{codes.name}_clipped", codes.shape, codes.type
    graph.insert_after(quantize, clip)
    for user, index in users:
        user.replace_input_with(index, clipped)


def _limits(node: ir.Node) -> tuple[float, float]:
    """The ends of a Relu or Clip; NaN where they are not constant."""
    ends = [0.0 if node.op_type == "Relu" else -np.inf, np.inf]
    for i in (1, 2):
        if len(node.inputs) > i and node.inputs[i] is not None:
            value = node.inputs[i].const_value  # type: ignore[union-attr]
            ends[i - 1] = np.nan if value is None else float(value.numpy())
    return ends[0], ends[1]


def saturates(quantize: ir.Node, low: float, high: float) -> bool:
    """True where every value at or below `low` gives the smallest integer, and every one at or above `high` the largest."""
    grid = _grid(quantize)
    if grid is None:
        return False
    scale, zero_point, (smallest, largest) = grid
    at_low = np.rint(np.float32(low) / scale) + zero_point.astype(np.float32)
    at_high = np.rint(np.float32(high) / scale) + zero_point.astype(np.float32)
    return bool((at_low <= smallest).all() and (at_high >= largest).all())


def _grid(quantize: ir.Node) -> tuple[np.ndarray, np.ndarray, tuple[int, int]] | None:
    """Scale, zero point and the ends of the integers of a QuantizeLinear; None for another operator, or where they are not constant."""
    constants = [v.const_value if v is not None else None for v in quantize.inputs[1:3]]
    if quantize.op_type != "QuantizeLinear" or len(constants) < 2 or constants[0] is None or constants[1] is None:
        return None
    if constants[1].dtype not in LIMITS:
        return None
    return constants[0].numpy().astype(np.float32), constants[1].numpy(), LIMITS[constants[1].dtype]
