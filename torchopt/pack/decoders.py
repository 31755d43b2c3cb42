"""The ONNX side of packing: model-local functions in standard operators, which ORT inlines and folds at load.

One function decodes all tensors of a kind, and calls smaller ones, so that a file holds each step once:

    t4          codes → values                                  GatherElements: 0.6 ms a million in ORT, where Gather takes 4
    t5p2p4      rare high bits put into the codes               ScatterElements (add)
    mt4         a mask → running index → values                 CumSum, GatherElements
    g3t4        values scattered to the places                  ScatterElements
    c4 o r      a table a channel; one value; raw nonzeros      as in `Encoding`; with positions, codes are placed before values
    s6, g3, p4  what these call: see `blocks`

A letter u before says that the size is no multiple of eight (a cut more), T instead of t that all codes are taken, so that zero has
none and needs a place of its own. The decoded graph is the dense one. What costs time at load is memory touched for the first time:
one int32 index a weight is 4 bytes, so steps stay in uint8 as long as they can, and four-bit codes are cast from UINT4 in one step
(opset 21). `NonZero` and `Compress` would not fold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
from onnx import parser

from torchopt.codecs import Encoding
from torchopt.codecs.encoding import DOMAIN
from torchopt.pack.decoder_parts import ADDS_AT_PLACES, CUT, FOUR_BITS, block, filled, inputs, symbols

_SIZES: dict[tuple[str, int], dict[str, int]] = {}  # bytes of the functions of a kind, by the kind's name and the opset

_SIZE = """
  shape = Constant <value_ints: ints = @d> ()
  size = ReduceProd (shape)
"""
_COUNTED = """
  axis = Constant <value_int = 0> ()
  counted = CumSum (real, axis)
  index = Mul (counted, real)
"""
_CODED = """
  codes_index = Cast <to = 6> ({0})
  {1} = GatherElements <axis = 0> (table, codes_index)
"""
_ZERO_FIRST = """
  nothing = Constant <value_floats = [0.0]> ()
  zero = Cast <to: int = @t> (nothing)
  values = Concat <axis = 0> (zero, nonzeros)
"""
_PICK = """
  placed = GatherElements <axis = 0> (values, index)
"""
_SCATTER = """
  updates = GatherElements <axis = 0> (values, index)
  first = Constant <value_ints = [0]> ()
  second = Constant <value_ints = [1]> ()
  blank = Slice (values, first, second)
  empty = Expand (blank, size)
  placed = ScatterElements <axis = 0> (empty, place, updates)
"""
_TABLE = """
  code_index = Cast <to = 6> ({0})
  flat = GatherElements <axis = {1}> (table, code_index)
"""
_ROWS = """
  table_shape = Shape (table)
  none = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  channels = Slice (table_shape, none, one)
  others = Constant <value_ints = [-1]> ()
  rows_shape = Concat <axis = 0> (channels, others)
  code_rows = Reshape ({0}, rows_shape)
"""
_END = """
  weight = Reshape (flat, shape)
"""


def function_name(encoding: Encoding, opset: int) -> str:
    """Return the short name of the function that decodes such an encoding; equal kinds share one."""
    where = {"all": "", "mask": "m", "gaps": f"g{encoding.gap_bits}"}[encoding.positions]
    values = encoding.values[0].upper() if encoding.full else encoding.values[0]
    planes = "".join(f"p{width}" for width, _ in encoding.planes)
    return f"{'u' if _uneven(encoding, opset) else ''}{where}{values}{encoding.code_bits or ''}{planes}"


def functions(encoding: Encoding, opset: int) -> list[ir.Function]:
    """Return the model-local functions that decode encodings of this kind: the one to call, and those that it calls.

    Args:
        encoding: an example of the kind.
        opset: of the model that the functions go into.
    """
    return functions_of(function_name(encoding, opset), _decoder(encoding, opset), opset)


def functions_of(name: str, text: str, opset: int) -> list[ir.Function]:
    """Return the function of this name and text, and those that it calls."""
    texts = {name: text}
    waiting = list(texts)
    while waiting:
        for name in _called(texts[waiting.pop()]):
            if name not in texts:
                texts[name] = block(name, opset)
                waiting.append(name)
    return [_function(name, text, opset) for name, text in texts.items()]


def decodable(encoding: Encoding, opset: int) -> bool:
    """Whether the operators of `opset` can decode such an encoding."""
    return not encoding.planes or opset >= ADDS_AT_PLACES


def function_bytes(encoding: Encoding, opset: int) -> dict[str, int]:
    """Return about how many bytes each function that decodes such encodings takes in a file, once."""
    name = function_name(encoding, opset)
    if (name, opset) not in _SIZES:
        made = functions(encoding, opset)
        _SIZES[name, opset] = {f.name: len(ir.serde.serialize_function(f).SerializeToString()) + 3 for f in made}
    return _SIZES[name, opset]


def _uneven(encoding: Encoding, opset: int) -> bool:
    """Whether the decoded stream is longer than the tensor."""
    width = 1 if encoding.positions == "mask" else encoding.code_bits
    streamed = encoding.positions == "mask" or (encoding.positions == "all" and width > 0)
    return streamed and filled(width, opset) and math.prod(encoding.shape) % 8 != 0


@dataclass
class _Text:
    """A function being written."""

    opset: int
    inputs: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=lambda: ["d"])
    body: str = _SIZE

    def is_four(self, bits: int) -> bool:
        return bits == 4 and self.opset >= FOUR_BITS

    def codes(self, bits: int, length: str | None, *, as_bytes: bool) -> str:
        """Take in the codes, if there are any: symbols, or UINT4 where that will do."""
        if self.is_four(bits) and not as_bytes:
            self.inputs.append("codes")
            return "codes"
        return self.symbols("codes", bits, length) if bits else ""

    def symbols(self, name: str, bits: int, length: str | None) -> str:
        """Take in a stream and unpack it, cut to a length on request; return what it is called then."""
        self.inputs += inputs(name, bits, self.opset)
        steps, found = symbols(name, bits, self.opset)
        self.body += steps
        if length is None:
            return found
        self.body += CUT.format(found, f"{name}_cut", length)
        return f"{name}_cut"

    def gap_symbols(self, name: str, bits: int, attribute: str) -> str:
        """The same for gaps, whose number an attribute tells where the stream is filled up."""
        if not filled(bits, self.opset):
            return self.symbols(name, bits, None)
        self.attributes.append(attribute)
        self.body += f"{name}_length = Constant <value_ints: ints = @{attribute}> ()\n"
        return self.symbols(name, bits, f"{name}_length")

    def whole(self) -> str:
        return f"<{', '.join(self.attributes)}> ({', '.join([*self.inputs, 'table'])}) => (weight) {{{self.body}{_END}}}"


def _decoder(encoding: Encoding, opset: int) -> str:
    """Head and body of the function that decodes a whole tensor."""
    text = _Text(opset)
    if encoding.positions == "all":
        _everywhere(text, encoding)
    else:
        _sparse(text, encoding)
    return text.whole()


def _everywhere(text: _Text, encoding: Encoding) -> None:
    """Every element has a code, or all have one value."""
    if encoding.values == "one":
        text.body += "flat = Expand (table, shape)"
        return
    bits, channel = encoding.code_bits, encoding.values == "channel"
    codes = text.codes(bits, "size" if _uneven(encoding, text.opset) else None, as_bytes=bool(encoding.planes))
    if channel and not text.is_four(bits):  # UINT4 lies there in rows
        text.body, codes = text.body + _ROWS.format(codes), "code_rows"
    for number, (gap_bits, _) in enumerate(encoding.planes):
        gaps = text.gap_symbols(f"plane{number}", gap_bits, f"p{number}")
        text.body += f"more{number} = {DOMAIN}.p{gap_bits} <k: int = {bits + number}> ({codes}, {gaps})\n"
        codes = f"more{number}"
    text.body += _TABLE.format(codes, int(channel))


def _sparse(text: _Text, encoding: Encoding) -> None:
    """Nonzeros to their places: picked by a running index through the mask, or scattered to where the gaps lead."""
    gaps, channel = encoding.positions == "gaps", encoding.values == "channel"
    codes = text.codes(encoding.code_bits, None, as_bytes=channel)
    if gaps:
        flags = text.gap_symbols("where", encoding.gap_bits, "p")
        text.body += f"place, real = {DOMAIN}.g{encoding.gap_bits} ({flags})"
    else:
        flags = text.symbols("where", 1, "size" if _uneven(encoding, text.opset) else None)
        text.body += f"real = Cast <to = 6> ({flags})"
    text.body += "index = Identity (real)" if encoding.values == "one" else _COUNTED
    if channel:
        text.body += f"values = Identity ({codes})"
    elif encoding.full:
        text.attributes.append("t")
        text.body += _CODED.format(codes, "nonzeros") + _ZERO_FIRST
    else:
        text.body += _CODED.format(codes, "values") if codes else "values = Identity (table)"
    text.body += _SCATTER if gaps else _PICK
    text.body += _ROWS.format("placed") + _TABLE.format("code_rows", 1) if channel else "flat = Identity (placed)"


def _called(text: str) -> Iterator[str]:
    for piece in text.split(f"{DOMAIN}.")[1:]:
        yield piece.split(maxsplit=1)[0]


def _function(name: str, text: str, opset: int) -> ir.Function:
    own = f', "{DOMAIN}": 1' if f"{DOMAIN}." in text else ""
    proto = parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {opset}{own}]>\n{name} {text}')
    return ir.serde.deserialize_function(_minimal(proto))


def _minimal(proto: onnx.FunctionProto) -> onnx.FunctionProto:
    """Make the body short, for it is in every file: inner names of one or two letters, equal constants once, nothing unused."""
    names = {name: name for name in (*proto.input, *proto.output)}
    seen: dict[bytes, str] = {}
    nodes: list[onnx.NodeProto] = []
    read = {name for node in proto.node for name in node.input}
    for node in proto.node:
        node.input[:] = [names[name] for name in node.input]
        content = b"".join(attribute.SerializeToString() for attribute in node.attribute)
        if node.op_type == "Identity":
            names[node.output[0]] = node.input[0]
        elif not read & {*node.output} and not {*node.output} & {*proto.output}:
            continue
        elif node.op_type == "Constant" and content in seen:
            names[node.output[0]] = seen[content]
        else:
            for place, name in enumerate(node.output):
                node.output[place] = names.setdefault(name, f"_{len(names):x}")
            seen |= {content: node.output[0]} if node.op_type == "Constant" else {}
            nodes.append(node)
    del proto.node[:]
    proto.node.extend(nodes)
    return proto
