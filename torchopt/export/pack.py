"""Pack and unpack any ONNX file: weights as codes, tables, masks and gaps, decoded by the runtime at load. Lossless both ways.

Each initializer is given its smallest encoding (`torchopt.packing`) and becomes one call of a model-local function whose output
has the initializer's old name; nothing else in the graph changes. `unpack` finds those calls again and restores the dense tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from torchopt.errors import FileError, ModelError
from torchopt.export.decoders import DOMAIN, FUNCTION_BYTES, function, function_name
from torchopt.files import atomic_path
from torchopt.packing import Encoding, decode, encode, entropy_bytes, from_parts, to_parts

PACKABLE = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32}
OLDEST_OPSET = 18  # BitwiseAnd, BitwiseOr
SMALLEST = 256  # bytes of a tensor below which no encoding pays


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One row of a `PackReport`: a tensor, its codec, and bytes before, after, and at the entropy bound."""

    name: str
    codec: str
    dense_bytes: int
    packed_bytes: int
    entropy_bytes: int


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What packing did to each tensor that it looked at."""

    rows: list[PackedTensor] = field(default_factory=list)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all the tensors before."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all the tensors after, tables and positions included."""
        return sum(row.packed_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{r.name:<40} {r.codec:<16} {r.dense_bytes:>12,} → {r.packed_bytes:>10,}" for r in self.rows]
        return "\n".join([*lines, f"{'total':<57} {self.dense_bytes:>12,} → {self.packed_bytes:>10,}"])


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> PackReport:
    """Write `src` with its weights packed to `dst`; outputs stay bit-equal.

    Args:
        src: any ONNX file.
        dst: the file to write; the same path as `src` is fine.

    Raises:
        FileError: `src` is missing or no ONNX file, or `dst` cannot be written.
        ModelError: the model's opset is older than 18, which has no bitwise operators.
    """
    model = read(src)
    report = pack_model(model)
    _write(model, dst)
    return report


def unpack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Write `src` with every packed weight dense again to `dst`: the exact inverse of `pack`.

    Raises:
        FileError: `src` is missing, damaged, or no ONNX file, or `dst` cannot be written.
    """
    model = read(src)
    unpack_model(model, str(src))
    _write(model, dst)


def decode_initializers(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the value of each weight of an ONNX file: unpacked, and integers times their scale, by the initializer's name.

    Raises:
        FileError: the file is missing, damaged, or no ONNX file.
    """
    model = read(path)
    unpack_model(model, str(path))
    values = {name: v.const_value.numpy() for name, v in model.graph.initializers.items() if v.const_value is not None}
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].name in values:
            values[str(node.inputs[0].name)] = _dequantized(node, values)
        elif node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].name in values:  # float16 weights
            name = str(node.inputs[0].name)
            values[name] = values[name].astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    return values


def pack_model(model: ir.Model) -> PackReport:
    """Pack the weights of `model` in place.

    Raises:
        ModelError: the opset is older than 18.
    """
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise ModelError(f"pack: the model has opset {opset}; convert it to {OLDEST_OPSET} or later, which has bitwise operators")
    rows: dict[str, PackedTensor] = {}
    names = _Names(model)
    fixed = {id(v) for v in (*model.graph.outputs, *model.graph.inputs)}
    weights = [v for v in model.graph.initializers.values() if id(v) not in fixed and _packable(v)]
    order = [str(v.name) for v in weights]
    for value in sorted(weights, key=lambda v: -v.const_value.nbytes):  # type: ignore[union-attr]  # the largest choose the decoders
        dense = value.const_value.numpy()  # type: ignore[union-attr]
        encoding = encode(dense, lambda e: 0 if _key(e) in model.functions else FUNCTION_BYTES)
        if encoding is None:
            continue
        rows[str(value.name)] = PackedTensor(
            name=str(value.name),
            codec=encoding.name,
            dense_bytes=dense.nbytes,
            packed_bytes=encoding.payload_bytes,
            entropy_bytes=entropy_bytes(dense, encoding),
        )
        _replace(model, value, encoding, opset, names)
    return PackReport(rows=[rows[name] for name in order if name in rows])


def unpack_model(model: ir.Model, where: str) -> None:
    """Make every packed weight of `model` an ordinary initializer again, in place.

    Raises:
        FileError: a packed weight is damaged.
    """
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        if len(node.outputs) != 1:
            raise FileError(f"{where}: the packed weight of node {node.name!r} is damaged ({len(node.outputs)} outputs)")
        try:
            dense = decode(_read_encoding(node))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError) as error:
            raise FileError(f"{where}: the packed weight {node.outputs[0].name} is damaged ({error})") from error
        output = node.outputs[0]
        initializer = ir.Value(name=output.name, const_value=ir.tensor(dense, name=output.name))
        initializer.shape, initializer.dtype = ir.Shape(dense.shape), ir.DataType.from_numpy(dense.dtype)
        parts = [v for v in node.inputs if v is not None]
        for user, index in list(output.uses()):
            user.replace_input_with(index, initializer)
        model.graph.remove(node, safe=True)
        output.name = None
        for part in parts:
            if not list(part.uses()) and part.name in model.graph.initializers:
                model.graph.initializers.pop(str(part.name))
        model.graph.register_initializer(initializer)
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)


def _packable(value: ir.Value) -> bool:
    """A weight: of a known type, read by nodes, none of which is a decoder of ours (a packed file stays as it is)."""
    tensor, users = value.const_value, list(value.uses())
    if tensor is None or tensor.dtype not in PACKABLE or not users or tensor.nbytes <= SMALLEST:
        return False
    return all(user.domain != DOMAIN for user, _ in users)


class _Names:
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


def _key(encoding: Encoding) -> tuple[str, str, str]:
    return DOMAIN, function_name(encoding), ""


def read(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file.

    Raises:
        FileError: it is missing, damaged, or no ONNX file.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file; give an ONNX file")
    try:
        model = ir.serde.deserialize_model(onnx.load(path))
    except Exception as error:  # protobuf, onnx and onnx-ir raise classes of their own
        raise FileError(
            f"{path}: is no whole ONNX file ({str(error).splitlines()[0][:200] if str(error) else error!r})"
        ) from error
    if not model.opset_imports:
        raise FileError(f"{path}: is no ONNX file: it names no operator set")
    return model


def _write(model: ir.Model, path: str | os.PathLike[str]) -> None:
    try:
        data = ir.to_proto(model).SerializeToString()
    except Exception as error:  # google.protobuf.message.EncodeError or a ValueError, by version
        raise ModelError(f"{path}: cannot be one file (protobuf holds at most 2 GB): {str(error)[:200]}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _replace(model: ir.Model, value: ir.Value, encoding: Encoding, opset: int, names: _Names) -> None:
    """Put a call of the decoding function in the place of an initializer."""
    graph, name, users = model.graph, str(value.name), list(value.uses())
    key = _key(encoding)
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
    yield ir.AttrInt64s("shape", encoding.shape)
    size = math.prod(encoding.shape)
    if encoding.code_bits not in (0, 8):
        yield ir.AttrInt64s("count", [len(encoding.codes)])
    if encoding.where is not None:
        yield ir.AttrInt64s("size", [size])
        if encoding.positions == "gaps" and encoding.gap_bits != 8:
            yield ir.AttrInt64s("places", [len(encoding.where)])
    if encoding.values == "channel":
        yield ir.AttrInt64s("rows", [encoding.table.shape[0], -1])


def _read_encoding(node: ir.Node) -> Encoding:
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
    shape, table = tuple(ints["shape"]), arrays[-1]
    codes = _stream(arrays.pop(0), code_bits, ints.get("count")) if code_bits else np.empty(0, np.uint8)
    where = None
    if positions == "mask":
        where = arrays[0][0]
    elif positions == "gaps":
        where = _stream(arrays[0], gap_bits, ints.get("places"))
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


def _dequantized(node: ir.Node, values: dict[str, np.ndarray]) -> np.ndarray:
    q, scale = (values[str(v.name)] for v in node.inputs[:2] if v is not None)
    zero_point = values[str(node.inputs[2].name)] if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1, q.dtype)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1

    def spread(array: np.ndarray) -> np.ndarray:
        return array.reshape([-1 if i == axis % q.ndim else 1 for i in range(q.ndim)]) if array.size > 1 else array.reshape(())

    return (q.astype(np.float32) - spread(zero_point).astype(np.float32)) * spread(scale)
