"""An encoding as a call of its decoder in the graph, and back: which arrays become constants, under which names.

A call's inputs are the codes, the positions, a zero, and the table, as far as the encoding has them; its attributes are the sizes that
the arrays alone do not tell: d the dense shape, n its elements, c the codes, p the gap symbols, r the rows of a table a channel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from torchopt.export.decoders import DOMAIN, function, function_name
from torchopt.packing import Encoding, from_parts, to_parts


class Names:
    """Short names that nothing in the model has, subgraphs included; equal constants get the same one."""

    def __init__(self, model: ir.Model) -> None:
        self.taken = {str(v.name) for v in (*model.graph.inputs, *model.graph.initializers.values())}
        self.known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            self.taken.update(str(v.name) for v in (*node.inputs, *node.outputs) if v is not None)
            for attribute in node.attributes.values():
                graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
                self.taken.update(str(v.name) for g in graphs for v in (*g.inputs, *g.initializers.values()))
        self.number = 0

    def constant(self, graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
        """Return an initializer that holds `tensor`, a new one or an equal one of an earlier call."""
        array = tensor.numpy()
        key = (str(tensor.dtype), tuple(array.shape), hashlib.sha256(tensor.tobytes()).digest())
        if key not in self.known:
            while f"_{self.number:x}" in self.taken:
                self.number += 1
            value = ir.Value(
                name=f"_{self.number:x}", const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
            self.taken.add(str(value.name))
            graph.register_initializer(value)
            self.known[key] = value
        return self.known[key]


def replace(model: ir.Model, value: ir.Value, encoding: Encoding, opset: int, names: Names) -> None:
    """Put a call of the decoding function in the place of an initializer."""
    graph, name, users = model.graph, str(value.name), list(value.uses())
    key = (DOMAIN, function_name(encoding), "")
    if key not in model.functions:
        model.functions[key] = function(encoding, opset)
        model.opset_imports[DOMAIN] = 1
    graph.initializers.pop(name)
    value.name = None
    inputs = [names.constant(graph, data) for data in _arrays(encoding)]
    node = ir.Node(DOMAIN, function_name(encoding), inputs, list(_attributes(encoding)))
    output = node.outputs[0]
    output.name, output.shape = name, value.shape
    output.dtype = value.dtype  # type: ignore[assignment]
    first = next(iter(graph))
    graph.insert_before(first, node)
    for user, index in users:
        user.replace_input_with(index, output)


def _arrays(encoding: Encoding) -> Iterator[ir.TensorProtocol]:
    """The constants of a call, in the order of the function's inputs: codes, where, zero, table."""
    if encoding.code_bits:
        yield _symbols(encoding.codes, encoding.code_bits)
    if encoding.where is not None:
        where = encoding.where
        yield ir.tensor(where[None, :]) if encoding.positions == "mask" else _symbols(where, encoding.gap_bits)
        yield ir.tensor(np.zeros((*encoding.table.shape[:-1], 1), dtype=encoding.dtype))
    yield ir.tensor(encoding.table)


def _symbols(symbols: np.ndarray, bits: int) -> ir.TensorProtocol:
    return ir.tensor(symbols if bits == 8 else to_parts(symbols, bits))


def _attributes(encoding: Encoding) -> Iterator[ir.Attr]:
    yield ir.AttrInt64s("d", encoding.shape)
    size = math.prod(encoding.shape)
    if encoding.code_bits not in (0, 8):
        yield ir.AttrInt64s("c", [len(encoding.codes)])
    if encoding.where is not None:
        yield ir.AttrInt64s("n", [size])
        if encoding.positions == "gaps" and encoding.gap_bits != 8:
            yield ir.AttrInt64s("p", [len(encoding.where)])
    if encoding.values == "channel":
        yield ir.AttrInt64s("r", [encoding.table.shape[0], -1])


def read_encoding(node: ir.Node) -> Encoding:
    """The encoding that a call of a decoding function holds."""
    letters = node.op_type
    positions = {"m": "mask", "g": "gaps"}.get(letters[0], "all")
    gap_bits = int(letters[1]) if positions == "gaps" else 0
    rest = letters[2:] if positions == "gaps" else letters[1:] if positions == "mask" else letters
    values = {"t": "table", "c": "channel", "o": "one", "r": "raw"}[rest[0]]
    code_bits = int(rest[1:] or 0)
    data = [v.const_value for v in node.inputs if v is not None]
    if any(d is None for d in data):
        raise ValueError("an operand is no constant")
    arrays: list[Any] = [d.numpy() for d in data if d is not None]
    ints = {key: list(attr.as_ints()) for key, attr in node.attributes.items()}
    shape, table = tuple(ints["d"]), arrays[-1]
    codes = _stream(arrays.pop(0), code_bits, ints.get("c")) if code_bits else np.empty(0, np.uint8)
    where = None
    if positions == "mask":
        where = arrays[0][0]
    elif positions == "gaps":
        where = _stream(arrays[0], gap_bits, ints.get("p"))
    return Encoding(
        positions=positions,
        values=values,
        shape=shape,
        dtype=table.dtype,
        code_bits=code_bits,
        gap_bits=gap_bits,
        codes=codes,
        where=where,
        table=table,
    )


def _stream(array: np.ndarray, bits: int, count: list[int] | None) -> np.ndarray:
    if bits == 8:
        return array
    assert count is not None
    return from_parts(array, count[0])
