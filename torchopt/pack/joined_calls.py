"""Codes of several tensors as one call in the graph, and a call a tensor that cuts it out; and back.

    H3          codes with three plain bits each                 h8, s3
    H0g5        nonzero codes and gaps of five bits              h8 twice, g5, ScatterElements
    t4, mt4 …   the codes as an ordinary tensor of bytes         as `decoders`
    v           codes, from o on → values in a shape             Slice, GatherElements

A call of the first three gives codes that only calls of the last one read. Attributes of the first two: d how many codes in all, b and
c what every lane has (of the codes, of the gaps), p and q how many symbols there are (gaps, nonzero codes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from torchopt.codecs import Encoding, decode
from torchopt.codecs.encoding import DOMAIN
from torchopt.codecs.huffman import Huffman
from torchopt.codecs.joined import Joined, apart
from torchopt.onnx_file.view import Constant
from torchopt.pack.decoder_calls import Call, Names, attributes_of, constants_of, put, read_encoding, read_stream, stream_of
from torchopt.pack.decoder_parts import inputs, symbols
from torchopt.pack.decoders import function_name, functions, functions_of

CUT_KIND = "v"
_KEPT = "torchopt.codes"  # where what a call gives is kept for all tensors that are cut out of it
_KIND = re.compile(r"H([0-5])(?:g([2-6]))?")
_CUT_OUT = """<d, o> (codes, table) => (weight) {
  shape = Constant <value_ints: ints = @d> ()
  size = ReduceProd (shape)
  begin = Constant <value_ints: ints = @o> ()
  stop = Add (begin, size)
  piece = Slice (codes, begin, stop)
  index = Cast <to = 6> (piece)
  flat = GatherElements <axis = 0> (table, index)
  weight = Reshape (flat, shape)
}"""
_STREAM = """
  {1}_base = Constant <value_ints: ints = @{2}> ()
  {1}_count = Constant <value_ints: ints = @{3}> ()
  {0} = torchopt.h8 ({1}, {1}_lanes, {1}_base, {1}_order, {1}_free, {1}_count)
"""
_TOGETHER = """
  width = Constant <value = uint8 {{{0}}}> ()
  above = BitShift <direction = "LEFT"> (high, width)
  start = Constant <value_ints = [0]> ()
  low_bits = Slice ({1}, start, data_count)
  codes = BitwiseOr (above, low_bits)
"""
_PLACED = """
  place, real = torchopt.g{0} (gap_symbols)
  axis = Constant <value_int = 0> ()
  counted = CumSum (real, axis)
  index = Mul (counted, real)
  blank = Constant <value = uint8[1] {{0}}> ()
  values = Concat <axis = 0> (blank, codes)
  updates = GatherElements <axis = 0> (values, index)
  size = Constant <value_ints: ints = @d> ()
  empty = Expand (blank, size)
  all = ScatterElements <axis = 0> (empty, place, updates)
"""


def joined_functions(joined: Joined | Encoding, opset: int) -> list[ir.Function]:
    """Return the functions that the calls of such codes need: the one to call, those that it calls, and the one that cuts."""
    cut = functions_of(CUT_KIND, _CUT_OUT, opset)
    return cut + (
        functions(joined, opset) if isinstance(joined, Encoding) else functions_of(_name(joined), _text(joined, opset), opset)
    )


def function_bytes_of(joined: Joined | Encoding, opset: int) -> dict[str, int]:
    """Return how many bytes each of them takes in a file, once."""
    return {f.name: len(ir.serde.serialize_function(f).SerializeToString()) + 3 for f in joined_functions(joined, opset)}


def joined_call(model: ir.Model, joined: Joined | Encoding, opset: int, names: Names) -> ir.Value:
    """Put the call that decodes the codes first in the graph, and return what it gives."""
    for function in joined_functions(joined, opset):
        model.functions.setdefault(function.identifier(), function)
    model.opset_imports[DOMAIN] = 1
    if isinstance(joined, Encoding):
        kind, tensors, attributes = function_name(joined, opset), constants_of(joined, opset), attributes_of(joined, opset)
    else:
        kind, tensors, attributes = _name(joined), _arrays(joined, opset), _attributes(joined)
    node = ir.Node(DOMAIN, kind, [names.constant(model.graph, data) for data in tensors], list(attributes))
    node.outputs[0].name = names.fresh()
    model.graph.insert_before(next(iter(model.graph)), node)
    node.name = None
    return node.outputs[0]


def is_joined(node: ir.Node) -> bool:
    """Whether a node decodes codes that other calls cut tensors out of."""
    uses = list(node.outputs[0].uses()) if node.domain == DOMAIN and len(node.outputs) == 1 else []
    return bool(uses) and all(user.domain == DOMAIN and user.op_type == CUT_KIND and index == 0 for user, index in uses)


def cut_call(constant: Constant, codes: ir.Value, table: ir.Value, start: int) -> ir.Node:
    """Put the call that cuts a tensor out of codes in the place of a constant, and return it."""
    assert constant.tensor is not None
    sizes = [ir.AttrInt64s("d", constant.tensor.shape.numpy()), ir.AttrInt64s("o", [start])]
    before, node = codes.producer(), ir.Node(DOMAIN, CUT_KIND, [codes, table], sizes)
    assert before is not None
    return put(constant, node, after=before)


class Codes:
    """What a call gives that several tensors are cut out of; decoded once, when the first of them is asked for."""

    def __init__(self, node: ir.Node) -> None:
        self.call = Call.of(node, known=_KIND.fullmatch(node.op_type) is not None)
        self.count = math.prod(self.call.ints["d"])
        self.found: np.ndarray | None = None

    @classmethod
    def of(cls, value: ir.Value | None) -> Codes:
        """Of a value; the same for all tensors that are cut out of it.

        Raises:
            ValueError: no call gives it.
        """
        node = value.producer() if value is not None else None
        if node is None or node.domain != DOMAIN or node.op_type == CUT_KIND:
            raise ValueError("the codes are no packed ones")
        if _KEPT not in node.meta:
            node.meta[_KEPT] = cls(node)
        return cast(Codes, node.meta[_KEPT])

    def array(self) -> np.ndarray:
        """All codes, uint8.

        Raises:
            ValueError, KeyError, IndexError: they are damaged.
        """
        if self.found is None:
            self.found = self._decoded()
        return self.found

    def _decoded(self) -> np.ndarray:
        kind = _KIND.fullmatch(self.call.kind)
        if kind is None:
            codes = decode(read_encoding(self.call))
            if codes.dtype != np.uint8:
                raise ValueError(f"codes of type {codes.dtype}")
            return codes.reshape(-1)
        low, gap_bits, ints, tensors = int(kind[1]), int(kind[2] or 0), self.call.ints, list(self.call.data)
        (count,), where = ints["d"], None
        if gap_bits:
            where = _huffman(tensors, ints["c"][0], ints["p"][0])
        high = _huffman(tensors, ints["b"][0], ints["q"][0] if gap_bits else count)
        plain = read_stream(tensors, low) if low else np.empty(0, np.uint8)
        return apart(Joined(count=count, low_bits=low, high=high, low=plain, gap_bits=gap_bits, where=where))


@dataclass(frozen=True, kw_only=True)
class CutCall:
    """What a call that cuts holds: the codes, the table, where they start, and the shape."""

    codes: Codes
    table: ir.TensorProtocol
    start: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node) -> CutCall:
        """The call that a node is.

        Raises:
            ValueError: it is none.
            KeyError: it tells no shape, or no place.
        """
        codes, table = node.inputs
        tensor = table.const_value if table is not None else None
        ints = {key: list(attr.as_ints()) for key, attr in node.attributes.items() if attr.type == ir.AttributeType.INTS}
        if tensor is None or min(ints["d"], default=0) < 0:
            raise ValueError("an operand is no constant" if tensor is None else f"shape {tuple(ints['d'])}")
        made, start, size = Codes.of(codes), ints["o"][0], math.prod(ints["d"])
        if not 0 <= start <= made.count - size:
            raise ValueError(f"elements {start} to {start + size} of {made.count} codes")
        return cls(codes=made, table=tensor, start=start, shape=tuple(ints["d"]))

    @property
    def dtype(self) -> ir.DataType:
        """Of the dense tensor."""
        return self.table.dtype

    def value(self) -> np.ndarray:
        """The dense tensor.

        Raises:
            ValueError: the codes end before it does, or one has no entry; or they are damaged.
        """
        codes, table, size = self.codes.array(), self.table.numpy(), math.prod(self.shape)
        if self.start + size > len(codes) or table.ndim != 1:
            raise ValueError(f"{len(codes)} codes, {self.start + size} or more are needed, in a table of shape {table.shape}")
        piece = codes[self.start : self.start + size]
        if size and piece.max() >= len(table):
            raise ValueError(f"code {piece.max()} has no entry in a table of {len(table)}")
        return np.asarray(table[piece].reshape(self.shape))


def check_sizes(node: ir.Node) -> None:
    """See that the shape of a call is one, and that what is cut out lies within the codes.

    Raises:
        ValueError: it is not so.
        KeyError: a size is missing.
    """
    if min(shape := list(node.attributes["d"].as_ints()), default=0) < 0:
        raise ValueError(f"shape {tuple(shape)}")
    made = node.inputs[0].producer() if node.op_type == CUT_KIND and node.inputs and node.inputs[0] is not None else None
    if made is not None and made.domain == DOMAIN:
        start, count = node.attributes["o"].as_ints()[0], math.prod(made.attributes["d"].as_ints())
        if not 0 <= start <= count - math.prod(shape):
            raise ValueError(f"elements {start} to {start + math.prod(shape)} of {count} codes")


def _huffman(tensors: list[ir.TensorProtocol], base: int, count: int) -> Huffman:
    bits, lanes, order, free = (tensors.pop(0).numpy() for _ in range(4))
    if bits.dtype != np.uint8 or bits.ndim != 1 or lanes.dtype not in (np.uint8, np.uint16) or lanes.ndim != 1:
        raise ValueError(f"a stream of {bits.dtype} {bits.shape} with lanes of {lanes.dtype} {lanes.shape}")
    return Huffman(data=bits, lanes=lanes, base=base, order=order, free=free, count=count)


def _name(joined: Joined) -> str:
    return f"H{joined.low_bits}{f'g{joined.gap_bits}' if joined.where is not None else ''}"


def _arrays(joined: Joined, opset: int) -> Iterator[ir.TensorProtocol]:
    for stream in (joined.where, joined.high):
        if stream is not None:
            yield from (ir.tensor(stream.data), ir.tensor(stream.lanes), ir.tensor(stream.order), ir.tensor(stream.free))
    if joined.low_bits:
        yield from stream_of(joined.low, joined.low_bits, opset)


def _attributes(joined: Joined) -> Iterator[ir.Attr]:
    yield ir.AttrInt64s("d", [joined.count])
    yield ir.AttrInt64s("b", [joined.high.base])
    if joined.where is not None:
        yield ir.AttrInt64s("c", [joined.where.base])
        yield ir.AttrInt64s("p", [joined.where.count])
        yield ir.AttrInt64s("q", [joined.high.count])


def _text(joined: Joined, opset: int) -> str:
    """Head and body of the function that decodes such codes."""
    sparse, low = joined.where is not None, joined.low_bits
    names, attributes, body = ["data", "data_lanes", "data_order", "data_free"], ["d", "b"], ""
    if sparse:
        names, attributes = ["where", "where_lanes", "where_order", "where_free", *names], [*attributes, "c", "p", "q"]
        body += _STREAM.format("gap_symbols", "where", "c", "p")
    body += _STREAM.format("high" if low else "codes", "data", "b", "q" if sparse else "d")
    if low:
        names += inputs("low", low, opset)
        steps, plain = symbols("low", low, opset)
        body += steps + _TOGETHER.format(low, plain)
    body += _PLACED.format(joined.gap_bits) if sparse else ""
    return f"<{', '.join(attributes)}> ({', '.join(names)}) => ({'all' if sparse else 'codes'}) {{{body}}}"
