"""How the exporter sees the rounding of activations: as one operator each, of which only the shape is known while it traces.

`FixedQuantize` writes QuantizeLinear and DequantizeLinear by `torch.onnx.ops.symbolic`, so that anyone's call of the exporter gives them.
Each of those carries the shape as an argument, and the exporter traces every operator four times: a third of the time of exporting an
int8 MobileNetV2. In the copy that torchopt exports, one operator with three operands stands for both, and becomes the same two nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch import nn

from torchopt.quantize.layers.rounding import FixedQuantize

_LIBRARY = torch.library.Library("torchopt", "DEF")
_LIBRARY.define("round_to_grid(Tensor x, Tensor scale, Tensor zero_point) -> Tensor")
_LIBRARY.impl("round_to_grid", lambda x, scale, zero_point: torch.empty_like(x), "Meta")
OPERATOR = torch.ops.torchopt.round_to_grid.default


class TracedGrid(FixedQuantize):
    """A `FixedQuantize` while it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor like `x`, float32."""
        result: torch.Tensor = OPERATOR(x, self.scale, self.zero_point)
        return result


def trace_grids(module: nn.Module) -> None:
    """Turn the quantizers of a module that is to be exported into `TracedGrid`, in place.

    Example:
        >>> net = nn.Sequential(FixedQuantize(torch.tensor(0.5), torch.tensor(0), 0, 255))
        >>> trace_grids(net)
        >>> type(net[0]).__name__
        'TracedGrid'
    """
    for part in module.modules():
        if type(part) is FixedQuantize:
            part.__class__ = TracedGrid


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what the exporter is to write for each operator of this file, in an operator set."""
    quantize, dequantize = (Op(Opset("", opset), name) for name in ("QuantizeLinear", "DequantizeLinear"))

    def round_to_grid(x: Any, scale: Any, zero_point: Any) -> Any:
        return dequantize(quantize(x, scale, zero_point), scale, zero_point)

    return {OPERATOR: round_to_grid}


def type_codes(graph: ir.Graph) -> None:
    """Note type and shape of the integers between two nodes, of which the exporter knows nothing."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        codes = node.outputs[0]
        if node.op_type != "QuantizeLinear" or codes.dtype is not None:
            continue
        x, _, zero_point = node.inputs
        if x is not None and zero_point is not None and zero_point.dtype is not None:
            codes.dtype, codes.shape = zero_point.dtype, x.shape
