"""From ONNX Runtime's graph to steps: what every operator's lowering shares. The operators stand in `operators/`, one function each.

Nodes are taken in order; those that only feed tables (`tables.py`) are left out. A value that a convolution or a pool reads has its
channels last; where another operator needs ONNX's own order, a step moves the elements, if the two orders differ at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from torchopt.c_code.finished import Finished
from torchopt.c_code.program import SUFFIX, Program, Step, Value, identifier
from torchopt.c_code.tables import tables
from torchopt.errors import ModelError

PICTURES = {
    "QLinearConv", "QLinearAveragePool", "QLinearGlobalAveragePool", "MaxPool", "AveragePool", "GlobalAveragePool", "Conv",
}  # fmt: skip
MOST_DIMENSIONS = 6
Operator = Callable[["Lowering", onnx.NodeProto], None]


class Lowering:
    """A graph on its way to steps.

    Args:
        found: the graph.
        where: the file's name, for messages.
        operators: the functions that lower a node, by its operator.
    """

    def __init__(self, found: Finished, where: str, operators: dict[str, Operator]) -> None:
        self.found, self.where, self.operators = found, where, operators
        self.constants = found.constants
        self.steps: list[Step] = []
        self.known: dict[str, Value] = {}
        self.node: onnx.NodeProto = onnx.NodeProto()

    def run(self) -> Program:
        """Lower everything.

        Raises:
            ModelError: an operator, a type or a form that C code is not written for.
        """
        graph = self.found.graph
        given = [value.name for value in graph.input if value.name not in self.constants]
        names = _distinct([*given, *("out_" + o.name if o.name in given else o.name for o in graph.output)])
        inputs = [self._outside(name, names[number]) for number, name in enumerate(given)]
        by_table = tables(self.found)
        for node in self._needed(by_table):
            self.node = node
            if node.output[0] in by_table:
                table = by_table[node.output[0]]
                source = self.value(table.source)
                fields = {"count": source.count, "values": table.values}
                self.step("table", [source], self.new(node.output[0], source.channels_last), fields, overlap={0: 0})
            elif node.op_type in self.operators:
                self.operators[node.op_type](self, node)
            else:
                taken = ", ".join(sorted(self.operators))
                raise self.error(f"has no form in C; the operators that have one are {taken}")
        outputs = [self._result(value.name, names[len(given) + number]) for number, value in enumerate(graph.output)]
        return Program(inputs=inputs, outputs=outputs, steps=self.steps)

    def error(self, reason: str) -> ModelError:
        """Return the error that says what of the current node cannot be written."""
        name = self.node.output[0] if self.node.output else ""
        return ModelError(f"{self.where}: the layer {name!r}: {self.node.op_type} {reason}")

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the current node."""
        for attribute in self.node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default

    def constant(self, index: int, what: str) -> np.ndarray:
        """Return an input of the current node that must be a constant."""
        name = self.node.input[index] if index < len(self.node.input) else ""
        if name not in self.constants:
            raise self.error(f"has {what} that the network computes; a constant is needed")
        return self.constants[name]

    def optional(self, index: int) -> np.ndarray | None:
        """Return an input of the current node that may be left out."""
        if index >= len(self.node.input) or not self.node.input[index]:
            return None
        return self.constant(index, f"an input {index}")

    def scalar(self, index: int, what: str) -> Any:
        """Return a constant input of one element; 0 where it is left out."""
        if index >= len(self.node.input) or not self.node.input[index]:
            return 0
        value = self.constant(index, what)
        if value.size != 1:
            raise self.error(f"has {value.size} values as {what}; one is needed")
        return value.reshape(())[()]

    def value(self, name: str) -> Value:
        """Return a value that a step, or the caller, has given; a constant becomes one that lies in flash."""
        if name not in self.known:
            array = self.constants[name]
            if array.dtype.name not in SUFFIX:
                raise self.error(f"reads {array.dtype} values; uint8, int8 and float32 have a form in C")
            self.known[name] = Value(name=name, shape=array.shape, dtype=array.dtype.name, constant=array)
        return self.known[name]

    def input(self, index: int = 0) -> Value:
        """Return an input of the current node."""
        return self.value(self.node.input[index])

    def new(self, name: str, channels_last: bool = False) -> Value:
        """Return a new value of a name in the graph."""
        like = self.found.values[name]
        if like.dtype.name not in SUFFIX:
            raise self.error(f"gives {like.dtype} values; uint8, int8 and float32 have a form in C")
        self.known[name] = Value(name=name, shape=like.shape, dtype=like.dtype.name, channels_last=channels_last)
        return self.known[name]

    def output(self, channels_last: bool = False) -> Value:
        """Return the value that the current node gives."""
        return self.new(self.node.output[0], channels_last)

    def shape(self) -> tuple[int, ...]:
        """Return the shape of what the current node gives."""
        return tuple(self.found.values[self.node.output[0]].shape)

    def step(
        self,
        function: str,
        inputs: list[Value],
        output: Value,
        fields: dict[str, Any],
        *,
        dtype: str | None = None,
        scratch: int = 0,
        overlap: dict[int, int] | None = None,
    ) -> None:
        """Add a call."""
        what = f"{self.node.op_type} {output.name}"
        kind = SUFFIX[dtype or inputs[0].dtype]
        self.steps.append(
            Step(
                function=function, dtype=kind, what=what, inputs=inputs, output=output, fields=fields, scratch=scratch,
                overlap=overlap or {},
            )
        )  # fmt: skip

    def plain(self, value: Value) -> Value:
        """Return the value in ONNX's order of elements."""
        if not value.channels_last:
            return value
        if value.layouts_agree:
            return value.alias(value.name, value.shape)
        sizes = [value.shape[0], *value.shape[2:], value.shape[1]]
        order = [0, len(sizes) - 1, *range(1, len(sizes) - 1)]
        return self._moved(value, sizes, order, channels_last=False)

    def last(self, value: Value) -> Value:
        """Return the value with its channels last."""
        if value.channels_last or len(value.shape) < 3:
            return value
        if value.layouts_agree:
            return value.alias(value.name, value.shape, channels_last=True)
        order = [0, *range(2, len(value.shape)), 1]
        return self._moved(value, list(value.shape), order, channels_last=True)

    def _moved(self, value: Value, sizes: list[int], order: list[int], *, channels_last: bool) -> Value:
        result = Value(name=value.name, shape=value.shape, dtype=value.dtype, channels_last=channels_last)
        self.move(value, result, sizes, order)
        return result

    def move(
        self,
        value: Value,
        result: Value,
        sizes: list[int],
        order: list[int],
        pads: list[tuple[int, int]] | None = None,
        fill: float = 0,
    ) -> None:
        """Add a step that writes elements in another order, cut or filled at the ends.

        Args:
            value: what is read.
            result: what is written.
            sizes: of what is read, as it lies in memory.
            order: which of these dimensions comes first, second, … in what is written.
            pads: before and after each dimension of what is written; negative ones cut.
            fill: what is written there.
        """
        if len(sizes) > MOST_DIMENSIONS:
            raise self.error(f"moves {len(sizes)} dimensions; at most {MOST_DIMENSIONS} have a form in C")
        strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        ends = pads or [(0, 0)] * len(order)
        front = MOST_DIMENSIONS - len(order)
        fields = {
            "sizes": [1] * front + [sizes[k] + sum(pad) for k, pad in zip(order, ends, strict=True)],
            "steps": [0] * front + [strides[k] for k in order],
            "before": [0] * front + [pad[0] for pad in ends],
            "inside": [1] * front + [sizes[k] for k in order],
            "fill": fill,
        }
        self.step("move", [value], result, fields)

    def alias(self, value: Value) -> None:
        """Let the current node's result be its input under another shape."""
        name = self.node.output[0]
        self.known[name] = value.alias(name, self.shape())

    def wants_channels_last(self, name: str) -> bool:
        """Whether a value of the graph is read by a convolution or a pool."""
        return any(name in node.input and node.op_type in PICTURES for node in self.found.graph.node)

    def _outside(self, name: str, parameter: str) -> Value:
        like = self.found.values[name]
        self.known[name] = Value(name=name, shape=like.shape, dtype=like.dtype.name, outside=parameter)
        return self.known[name]

    def _result(self, name: str, parameter: str) -> Value:
        value = self.plain(self.value(name))
        if not value.in_arena:  # an input or a constant as it is, or one that is another output too
            self.node = onnx.NodeProto(op_type="Identity", output=[name])
            result = Value(name=name, shape=value.shape, dtype=value.dtype)
            self.move(value, result, [value.count], [0])
            value = result
        value.root.outside = parameter
        return value

    def _needed(self, by_table: dict[str, Any]) -> list[onnx.NodeProto]:
        """The nodes that something needs and that are no constants, in order."""
        wanted = {value.name for value in self.found.graph.output}
        kept = []
        for node in reversed(self.found.graph.node):
            if wanted.isdisjoint(node.output) or node.output[0] in self.constants:
                continue
            kept.append(node)
            wanted |= {by_table[node.output[0]].source} if node.output[0] in by_table else set(node.input)
        return kept[::-1]


def _distinct(names: list[str]) -> list[str]:
    made: list[str] = []
    for name in map(identifier, names):
        own, number = name, 2
        while own in made:
            own, number = f"{name}_{number}", number + 1
        made.append(own)
    return made
