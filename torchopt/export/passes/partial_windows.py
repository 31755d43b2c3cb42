"""Average pools whose last windows hang over the edge (`ceil_mode`), in the form that integer kernels compute as float ones do.

torch and ONNX divide the sum of such a window by the positions in it, padding included and what lies beyond excluded. ONNX Runtime's
QLinearAveragePool divides by the whole window where padding counts.

1. no padding                                    → padding does not count: the same numbers
2. padding that counts, of integers              → Pad with zeros, and then as 1
3. the same, where a window would begin in the padding behind, or where sizes are unknown → kept from its integer kernel
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant
from torchopt.export.passes.keep_apart import keep_apart


class PartialWindowsPass(ir.passes.InPlacePass):
    """Cases 1 to 3 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        found = [node for node in model.graph if node.op_type == "AveragePool" and _hangs_over(node)]
        for node in found:
            pads = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else []
            if any(pads) and not _begins_inside(node, pads):
                keep_apart(model.graph, node)
                continue
            if any(pads):
                _pad(model.graph, node, pads)
            node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
        return ir.passes.PassResult(model, modified=bool(found))


def _hangs_over(pool: ir.Node) -> bool:
    asked = [pool.attributes[name].as_int() if name in pool.attributes else 0 for name in ("ceil_mode", "count_include_pad")]
    padded = "pads" in pool.attributes and any(pool.attributes["pads"].as_ints())
    source = pool.inputs[0].producer() if pool.inputs[0] is not None else None
    return all(asked) and (not padded or (source is not None and source.op_type == "DequantizeLinear"))


def _begins_inside(pool: ir.Node, pads: list[int]) -> bool:
    """True where the last window, counted over all of the padding, begins before the padding behind: others are not counted."""
    shape = pool.inputs[0].shape if pool.inputs[0] is not None else None
    kernel, n = list(pool.attributes["kernel_shape"].as_ints()), len(pads) // 2
    strides = list(pool.attributes["strides"].as_ints()) if "strides" in pool.attributes else [1] * n
    sizes = list(shape)[2:] if shape is not None else [None]
    if not all(isinstance(size, int) for size in sizes):
        return False
    along = zip(sizes, kernel, strides, pads[:n], pads[n:], strict=True)
    return all(math.ceil((size + a + b - k) / s) * s < size + a for size, k, s, a, b in along)  # type: ignore[operator]


def _pad(graph: ir.Graph, pool: ir.Node, pads: list[int]) -> None:
    x, n = pool.inputs[0], len(pads) // 2
    assert x is not None
    name = f"{pool.outputs[0].name}_padded"
    wide = np.array([0, 0, *pads[:n], 0, 0, *pads[n:]], np.int64)
    node = ir.Node("", "Pad", [x, constant(graph, f"{name}_by", wide)])
    value = node.outputs[0]
    value.name, value.type = name, x.type
    graph.insert_before(pool, node)
    pool.replace_input_with(0, value)
    pool.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
