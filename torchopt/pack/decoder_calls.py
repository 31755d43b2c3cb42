"""An encoding as a call of its decoder in the graph, and back: which arrays become constants, under which names.

A call's inputs are the codes, the positions, the planes, and the table, as far as the encoding has them; its attributes are the sizes
that the arrays alone do not tell: d the dense shape, p the number of gap symbols (p0, p1 … of the planes'), t the type of a zero.

The running index of the nonzeros starts at 1, and 0 means zero. So the zero is stored with the nonzeros: before raw ones and before the
one value, else as the table's last entry, whose code precedes the others; where all codes are taken, the decoder adds it ("T").
Tables a channel have it as their first entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from torchopt.codecs import Encoding, from_pairs, from_parts, in_pairs, padded, to_parts
from torchopt.codecs.encoding import DOMAIN
from torchopt.onnx_file.tensors import bytes_of
from torchopt.onnx_file.view import Constant, View, constant_of
from torchopt.pack.decoder_parts import FOUR_BITS, filled, in_two
from torchopt.pack.decoders import function_name, functions


class Names:
    """Short names that nothing in the model has, subgraphs and functions included; equal constants get the same one."""

    def __init__(self, view: View) -> None:
        self.taken: set[str] = set()
        self.known: dict[tuple[int, str, tuple[int, ...], bytes], ir.Value] = {}
        for scope in view.scopes:
            initializers = scope.body.initializers.values() if isinstance(scope.body, ir.Graph) else ()
            self.taken.update(str(v.name) for v in (*scope.body.inputs, *initializers))
        for _, node in view.nodes:
            self.taken.update(str(v.name) for v in (*node.inputs, *node.outputs) if v is not None)
        self.number = 0

    def constant(self, root: ir.Graph | ir.Function, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a constant that holds `tensor`, a new one or an equal one of an earlier call.

        Args:
            root: the main graph, whose initializers all scopes below see, or a function, which has none: there it is a node.
            tensor: the data.
        """
        shape = tensor.shape.numpy()
        key = (id(root), str(tensor.dtype), tuple(shape), hashlib.sha256(bytes_of(tensor).data).digest())
        if key not in self.known:
            self.known[key] = _held(root, tensor, self.fresh())
        return self.known[key]

    def fresh(self) -> str:
        """Return a name that is taken from now on."""
        while f"_{self.number:x}" in self.taken:
            self.number += 1
        name = f"_{self.number:x}"
        self.taken.add(name)
        return name


def _held(root: ir.Graph | ir.Function, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    if isinstance(root, ir.Graph):
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        root.register_initializer(value)
        return value
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
    node.outputs[0].name = name
    root.insert_before(next(iter(root)), node)
    node.name = None
    return node.outputs[0]


def replace(model: ir.Model, constant: Constant, encoding: Encoding, opset: int, names: Names) -> ir.Node:
    """Put a call of the decoding function in the place of a constant, and return it."""
    root, kind = constant.scope.root, function_name(encoding, opset)
    if (DOMAIN, kind, "") not in model.functions:
        for function in functions(encoding, opset):
            model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1
    if isinstance(root, ir.Function):
        root.opset_imports[DOMAIN] = 1
    inputs = [names.constant(root, data) for data in constants_of(encoding, opset)]
    return put(constant, ir.Node(DOMAIN, kind, inputs, list(attributes_of(encoding, opset))))


def put(constant: Constant, node: ir.Node, after: ir.Node | None = None) -> ir.Node:
    """Put a call in the place of a constant, behind a node that it reads from if there is one, and return it."""
    value, body = constant.value, constant.scope.body
    name, users, old = str(value.name), list(value.uses()), value.producer()
    if old is None and isinstance(body, ir.Graph):
        body.initializers.pop(name)
    value.name = None
    output = node.outputs[0]
    output.name = name
    output.meta.update(value.meta)  # what others wrote about it
    if after is not None and old is None:
        body.insert_after(after, node)
    else:
        body.insert_before(old if old is not None else next(iter(body)), node)
    node.name = None  # the graph gave it one: bytes
    for user, index in users:
        user.replace_input_with(index, output)
    if old is not None:
        body.remove(old, safe=True)
    return node


def constants_of(encoding: Encoding, opset: int) -> Iterator[ir.TensorProtocol]:
    """The constants of a call, in the order of the function's inputs: codes, where, planes, table."""
    table, codes, zero = encoding.table, encoding.codes, np.zeros(1, encoding.table.dtype)
    if encoding.positions != "all" and not encoding.full:
        if encoding.values == "table":
            codes, table = np.append(np.full(1, len(table), np.uint8), codes), np.append(table, zero)
        elif encoding.values == "channel":
            codes = np.append(np.zeros(1, np.uint8), codes)
        else:
            table = np.append(zero, table)
    if encoding.code_bits:
        rows = len(table) if encoding.values == "channel" and encoding.positions == "all" else 0
        yield from stream_of(codes, encoding.code_bits, opset, rows)
    if encoding.positions == "mask" and encoding.where is not None:
        yield ir.tensor(encoding.where[None, :])
    elif encoding.where is not None:
        yield from stream_of(encoding.where, encoding.gap_bits, opset)
    for bits, symbols in encoding.planes:
        yield from stream_of(symbols, bits, opset)
    yield ir.tensor(table)


def stream_of(symbols: np.ndarray, bits: int, opset: int, rows: int = 0) -> Iterator[ir.TensorProtocol]:
    """The tensors of a stream of symbols."""
    if bits == 8:
        yield ir.tensor(symbols)
    elif opset < FOUR_BITS or bits not in (4, 5):
        yield ir.tensor(to_parts(symbols, bits))
    else:
        symbols = padded(symbols) if in_two(bits, opset) else symbols
        shape = (rows, len(symbols) // rows) if rows and bits == 4 else (len(symbols),)
        yield ir.PackedTensor(in_pairs(symbols), ir.DataType.UINT4, shape=shape)
        if bits == 5:
            yield ir.tensor(to_parts(symbols >> 4, 1))


def attributes_of(encoding: Encoding, opset: int) -> Iterator[ir.Attr]:
    """The sizes that the arrays alone do not tell."""
    yield ir.AttrInt64s("d", encoding.shape)
    if encoding.positions == "gaps" and encoding.where is not None and filled(encoding.gap_bits, opset):
        yield ir.AttrInt64s("p", [len(encoding.where)])
    if encoding.full:
        yield ir.AttrInt64("t", int(ir.DataType.from_numpy(encoding.dtype)))
    for number, (bits, symbols) in enumerate(encoding.planes):
        if filled(bits, opset):
            yield ir.AttrInt64s(f"p{number}", [len(symbols)])


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    return value.const_value if node is None else constant_of(node)


_KIND = re.compile(r"u?(?:(m)|g([2-8]))?([tTcor])([1-8])?((?:p[2-8])*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a call of a decoding function holds: the function's name, its constants, and its attributes."""

    kind: str
    data: list[ir.TensorProtocol]
    ints: dict[str, list[int]]

    @classmethod
    def of(cls, node: ir.Node, *, known: bool = False) -> Call:
        """The call that a node is; its kind is looked at unless the caller knows it.

        Raises:
            ValueError: it is none.
            KeyError: it tells no shape.
        """
        data = [_tensor(v) for v in node.inputs if v is not None]
        constants = [d for d in data if d is not None]
        known = known or _KIND.fullmatch(node.op_type) is not None
        if not known or not data or len(constants) < len(data):
            raise ValueError("an operand is no constant" if known else f"kind {node.op_type!r}")
        ints = {key: list(attr.as_ints()) for key, attr in node.attributes.items() if attr.type == ir.AttributeType.INTS}
        if min(ints["d"], default=0) < 0:
            raise ValueError(f"shape {tuple(ints['d'])}")
        return cls(kind=node.op_type, data=constants, ints=ints)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""
        return tuple(self.ints["d"])

    @property
    def dtype(self) -> ir.DataType:
        """Of the dense tensor."""
        return self.data[-1].dtype


def read_encoding(call: Call) -> Encoding:
    """The encoding that a call holds."""
    kind, ints = _KIND.fullmatch(call.kind), call.ints
    assert kind is not None
    tensors = list(call.data)
    gap_bits, code_bits = int(kind[2] or 0), int(kind[4] or 0)
    table = tensors.pop().numpy()
    codes = read_stream(tensors, code_bits) if code_bits else np.empty(0, np.uint8)
    where = tensors.pop(0).numpy()[0] if kind[1] else None
    if gap_bits:
        where = read_stream(tensors, gap_bits)[: ints["p"][0] if "p" in ints else None]
    widths = [int(width) for width in kind[5].split("p")[1:]]
    planes = tuple(
        (width, read_stream(tensors, width)[: ints[f"p{i}"][0] if f"p{i}" in ints else None]) for i, width in enumerate(widths)
    )
    return _trimmed(
        Encoding(
            positions="mask" if kind[1] else "gaps" if gap_bits else "all",
            values={"t": "table", "c": "channel", "o": "one", "r": "raw"}[kind[3].lower()],
            shape=call.shape,
            dtype=table.dtype,
            code_bits=code_bits,
            gap_bits=gap_bits,
            codes=codes,
            where=where,
            table=table,
            planes=planes,
        ),
        full=kind[3] == "T",
    )


def _trimmed(stored: Encoding, full: bool) -> Encoding:
    """Without what the decoder needs beside: the zero in the table, its code, and the symbols that fill a stream up."""
    if stored.positions == "all":
        return dataclasses.replace(stored, codes=stored.codes[: math.prod(stored.shape)])
    first = 0 if full else 1
    codes = stored.codes[first : stored.nonzeros() + first]
    cut = {"raw": slice(1, None), "one": slice(1, None), "channel": slice(None), "table": slice(None, None if full else -1)}
    return dataclasses.replace(stored, codes=codes, table=stored.table[cut[stored.values]])


def read_stream(tensors: list[ir.TensorProtocol], bits: int) -> np.ndarray:
    """Take the tensors of one stream from the front, and return its symbols, filled up to a multiple of eight where they are."""
    first = tensors.pop(0)
    if first.dtype == ir.DataType.UINT4:
        symbols = from_pairs(bytes_of(first), first.size)
        if bits > 4:
            rest = tensors.pop(0).numpy()
            symbols |= from_parts(rest, 8 * rest.shape[1]) << 4
        return symbols
    stored = first.numpy()
    if stored.dtype != np.uint8 or (bits != 8 and len(stored) != bits):
        raise ValueError(f"symbols of {bits} bits as {stored.dtype} {stored.shape}")
    return stored if bits == 8 else from_parts(stored, 8 * stored.shape[1])
