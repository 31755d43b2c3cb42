"""Channels in the numbers that the integer convolutions of ONNX Runtime are fast for, the added ones all zeros.

Its kernels without a copy of the input (MLAS `ConvSym`) take 4 n input channels; those of depthwise convolutions take 16 n channels, and
anything else falls to one that is two to three times slower (28×28 pixels, 3×3: 69 µs with 88 channels, 32 µs with 96).

1. depthwise Conv with another number of channels     → as many zero channels more in every convolution from whose output they come and
   to whose input they go, squeeze-and-excitation included
2. Conv that reads the network's rounded input (three colours)   → a channel of zeros more there: Pad of the integers

A zero weight and a zero bias give 0, every operation between keeps 0 at 0 or is read by zero weights only: no number changes. In the
file a weight keeps its shape; a Pad follows it, which ONNX Runtime carries out when it loads the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant

DEPTHWISE, INPUT = 16, 4  # what the numbers of channels are to be multiples of
MOST = 1.0  # of the channels there are, the most that was measured to pay: 8 as 16 (28×28 pixels, 3×3: 158 → 114 µs with both neighbours)
ALONG = {
    "QuantizeLinear", "DequantizeLinear", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "MaxPool", "AveragePool",
    "GlobalAveragePool",
}  # fmt: skip
TOGETHER = {"Add", "Mul"}


class WideChannelsPass(ir.passes.InPlacePass):
    """Cases 1 and 2 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        outputs, inputs = _around_depthwise(model.graph)
        inputs |= _behind_input(model.graph, outputs)
        for conv in [n for n in model.graph if n in outputs or n in inputs]:
            _pad_weight(model.graph, conv, outputs.get(conv, 0), inputs.get(conv, 0))
        return ir.passes.PassResult(model, modified=bool(outputs or inputs))


def _around_depthwise(graph: ir.Graph) -> tuple[dict[ir.Node, int], dict[ir.Node, int]]:
    """Case 1: how many outputs and how many inputs each convolution is to get more."""
    outputs: dict[ir.Node, int] = {}
    inputs: dict[ir.Node, int] = {}
    for node in graph:
        if not _is_depthwise(node) or node in outputs:
            continue
        more = -_channels(node) % DEPTHWISE
        found = _Together(_channels(node)).from_value(node.outputs[0]) if 0 < more <= MOST * _channels(node) else None
        if found is not None:
            found.widen(more)
            outputs |= dict.fromkeys(found.makers | found.depthwise, more)
            inputs |= dict.fromkeys(found.readers, more)
    return outputs, inputs


def _behind_input(graph: ir.Graph, outputs: dict[ir.Node, int]) -> dict[ir.Node, int]:
    """Case 2: pad the input, and say how many inputs its convolution is to get more."""
    inputs = {}
    for node in [n for n in graph if _reads_input(n)]:
        more = -_weight(node).shape[1] % INPUT
        if more and (_channels(node) + outputs.get(node, 0)) % DEPTHWISE == 0:
            _pad_input(graph, node, more)
            inputs[node] = more
    return inputs


@dataclass
class _Together:
    """The convolutions whose channels can only become more together: those which make, keep and read them."""

    channels: int
    values: set[ir.Value] = field(default_factory=set)
    makers: set[ir.Node] = field(default_factory=set)
    depthwise: set[ir.Node] = field(default_factory=set)
    readers: set[ir.Node] = field(default_factory=set)

    def from_value(self, value: ir.Value) -> _Together | None:
        """Follow a value's channels both ways; None where something on the way is not known to let zeros be zeros."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value in self.values or _is_scalar(value) or _size(value) == 1:
                continue
            self.values.add(value)
            nodes = [(value.producer(), -1), *value.uses()]
            if value.is_graph_output() or _size(value) != self.channels:
                return None
            for node, index in nodes:
                if node is None or not self._take(node, index):
                    return None
                waiting += self._next(node, index)
        return self

    def widen(self, more: int) -> None:
        """Note the new shapes."""
        for value in self.values:
            assert value.shape is not None
            value.shape = ir.Shape([*value.shape[:1], self.channels + more, *value.shape[2:]])

    def _take(self, node: ir.Node, index: int) -> bool:
        if _is_depthwise(node):
            self.depthwise.add(node)
        elif _has_integers(node) and _groups(node) == 1:
            (self.readers if index == 0 else self.makers).add(node)
        return node in self.depthwise | self.readers | self.makers or node.op_type in ALONG | TOGETHER

    def _next(self, node: ir.Node, index: int) -> Iterator[ir.Value]:
        """What carries the same channels on the other side of a node, or beside it."""
        if node.op_type == "Conv" and node not in self.depthwise:
            return
        inputs = node.inputs if node.op_type in TOGETHER else node.inputs[:1]
        yield from (v for v in (*inputs, *node.outputs) if v is not None)


def _is_scalar(value: ir.Value) -> bool:
    """A constant of one element, dequantized or not."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value
    return source is not None and source.const_value is not None and source.const_value.size == 1


def _size(value: ir.Value) -> int | None:
    """The number of channels, where it is known."""
    size = value.shape[1] if value.shape is not None and len(value.shape) > 2 else None
    return size if isinstance(size, int) else None


def _weight(conv: ir.Node) -> np.ndarray:
    """The integers of a convolution."""
    return conv.inputs[1].producer().inputs[0].const_value.numpy()  # type: ignore[union-attr, no-any-return]


def _channels(conv: ir.Node) -> int:
    return int(_weight(conv).shape[0])


def _groups(conv: ir.Node) -> int:
    return conv.attributes["group"].as_int() if "group" in conv.attributes else 1


def _has_integers(node: ir.Node) -> bool:
    """A convolution with a weight of integers that nothing else reads."""
    dequantize = node.inputs[1].producer() if node.op_type == "Conv" and node.inputs[1] is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(list(dequantize.outputs[0].uses())) > 1:
        return False
    return all(v is None or v.const_value is not None for v in (*dequantize.inputs, *node.inputs[2:]))


def _is_depthwise(node: ir.Node) -> bool:
    """A depthwise convolution that runs on integers."""
    if not _has_integers(node) or not 1 < _groups(node) == _channels(node) or _weight(node).shape[1] != 1:
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return source is not None and source.op_type == "DequantizeLinear"


def _reads_input(node: ir.Node) -> bool:
    """A convolution of integers whose input is the network's own, rounded for it alone."""
    if not _has_integers(node) or _groups(node) > 1:
        return False
    source: ir.Value | None = node.inputs[0]
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        step = source.producer() if source is not None else None
        if step is None or step.op_type != kind or len(step.inputs) < 3 or len(list(step.outputs[0].uses())) > 1:
            return False
        source = step.inputs[0]
    return source is not None and source.is_graph_input()


def _pad_input(graph: ir.Graph, conv: ir.Node, more: int) -> None:
    dequantize = conv.inputs[0].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    codes, zero = dequantize.inputs[0], dequantize.inputs[2]
    rank = _weight(conv).ndim
    ends = [0] * (2 * rank)
    ends[rank + 1] = more
    pad = ir.Node("", "Pad", [codes, constant(graph, f"{conv.outputs[0].name}_pads", np.array(ends, np.int64)), zero])
    pad.outputs[0].name = f"{conv.outputs[0].name}_padded"
    pad.outputs[0].dtype = codes.dtype  # type: ignore[assignment, union-attr]
    graph.insert_before(dequantize, pad)
    dequantize.replace_input_with(0, pad.outputs[0])


def _pad_weight(graph: ir.Graph, conv: ir.Node, outputs: int, inputs: int) -> None:
    """Zeros behind a convolution's integers, scales and biases."""
    dequantize = conv.inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    weight, scale = dequantize.inputs[:2]
    assert weight is not None
    assert scale is not None
    rank = _weight(conv).ndim
    ends = np.zeros(2 * rank, dtype=np.int64)
    ends[rank : rank + 2] = outputs, inputs
    if _groups(conv) > 1:
        conv.attributes["group"] = ir.AttrInt64("group", _groups(conv) + outputs)
    name = f"{conv.outputs[0].name}_weight"
    pad = ir.Node("", "Pad", [weight, constant(graph, f"{name}_pads", ends)])
    pad.outputs[0].name, pad.outputs[0].dtype = f"{name}_padded", weight.dtype  # type: ignore[assignment]
    graph.insert_before(dequantize, pad)
    dequantize.replace_input_with(0, pad.outputs[0])
    if outputs and scale.const_value is not None and scale.const_value.size > 1:
        dequantize.replace_input_with(1, _longer(graph, f"{name}_steps", scale, outputs, 1.0))
    if outputs and len(conv.inputs) > 2 and conv.inputs[2] is not None:
        conv.replace_input_with(2, _longer(graph, f"{name}_bias", conv.inputs[2], outputs, 0.0))


def _longer(graph: ir.Graph, name: str, vector: ir.Value, more: int, filling: float) -> ir.Value:
    assert vector.const_value is not None
    array = vector.const_value.numpy()
    return constant(graph, name, np.concatenate([array, np.full(more, filling, array.dtype)]))
