"""The ONNX side of packing: one model-local function per codec, written in standard operators that ORT folds at load.

    symbols       bytes → int32 symbols                BitShift, BitwiseAnd, BitwiseOr
    positions     mask → running index                 CumSum
                  gaps → scattered index               CumSum, ScatterElements
    values        index → value                        GatherElements: 0.6 ms a million in ORT, where Gather takes 8

ORT inlines a model-local function and folds its constants, so the decoded graph is the dense one. `NonZero` would not fold.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import parser

from torchopt.packing import Encoding, parts

DOMAIN = "torchopt"
_SIZES: dict[str, int] = {}  # by the name of the function

_ROWS = """
  {0}_first = Constant <value_ints = [{1}]> ()
  {0}_last = Constant <value_ints = [{2}]> ()
  {0}_in = Slice ({3}, {0}_first, {0}_last)
"""
_PART = """
  {0}_line = Constant <value_ints = [1, -1]> ()
  {0}_row = Reshape ({1}, {0}_line)
  {0}_shifts = Constant <value = uint8[{2}, 1] {{{3}}}> ()
  {0}_shifted = BitShift <direction = "RIGHT"> ({0}_row, {0}_shifts)
  {0}_ones = Constant <value = uint8 {{{4}}}> ()
  {0}_low = BitwiseAnd ({0}_shifted, {0}_ones)
  {0}_line_shape = Constant <value_ints = [-1]> ()
  {0}_value = Reshape ({0}_low, {0}_line_shape)
"""
_JOIN = """
  {0}_place = Constant <value = uint8 {{{1}}}> ()
  {0}_high = BitShift <direction = "LEFT"> ({0}_value, {0}_place)
  {0}_joined = BitwiseOr ({2}, {0}_high)
"""
_CUT = """
  {0}_start = Constant <value_ints = [0]> ()
  {0}_stop = Constant <value_ints: ints = @{1}> ()
  {0}_bytes = Slice ({2}, {0}_start, {0}_stop)
"""
_SYMBOLS = """
  {0}_symbols = Cast <to = 6> ({1})
"""
_COUNT = """
  zero_axis = Constant <value_int = 0> ()
  counted = CumSum ({0}, zero_axis)
  index = Mul (counted, {0})
"""
_ONE = """
  index = Identity ({0})
"""
_GAPS = """
  filler = Constant <value = int32 {{{0}}}> ()
  one = Constant <value = int32 {{1}}> ()
  is_filler = Equal (where_symbols, filler)
  not_filler = Not (is_filler)
  real = Cast <to = 6> (not_filler)
  advance = Add (where_symbols, real)
  axis_zero = Constant <value_int = 0> ()
  reached = CumSum (advance, axis_zero)
  place = Sub (reached, one)
"""
_CODED = """
  nonzeros = GatherElements <axis = 0> (table, codes_symbols)
"""
_PLAIN = """
  nonzeros = Identity (table)
"""
_PICK = """
  values = Concat <axis = 0> (zero, nonzeros)
  {0} = GatherElements <axis = 0> (values, index)
"""
_SCATTER = """
  size = Constant <value_ints: ints = @n> ()
  empty = Expand (zero, size)
  flat = ScatterElements <axis = 0> (empty, place, updates)
"""
_TABLE = """
  flat = GatherElements <axis = 0> (table, codes_symbols)
"""
_CHANNEL = """
  rows = Constant <value_ints: ints = @r> ()
  code_rows = Reshape (codes_symbols, rows)
  flat = GatherElements <axis = 1> (table, code_rows)
"""
_CONSTANT = """
  shape = Constant <value_ints: ints = @d> ()
  weight = Expand (table, shape)
"""
_END = """
  shape = Constant <value_ints: ints = @d> ()
  weight = Reshape (flat, shape)
"""


def function_name(encoding: Encoding) -> str:
    """Return the short name of the function that decodes such an encoding; equal encodings share one."""
    where = {"all": "", "mask": "m", "gaps": f"g{encoding.gap_bits}"}[encoding.positions]
    return f"{where}{encoding.values[0]}{encoding.code_bits or ''}"


def function(encoding: Encoding, opset: int) -> ir.Function:
    """Return the model-local function that decodes encodings of this kind.

    Args:
        encoding: an example of the kind.
        opset: of the model that the function goes into.
    """
    inputs, attributes, body = [], ["d"], ""
    if encoding.code_bits:
        inputs.append("codes")
        body += _symbols("codes", "c", encoding.code_bits, attributes)
    if encoding.where is not None:
        inputs += ["where", "zero"]
        body += _sparse(encoding, attributes) + _END
    elif encoding.values == "one":
        body += _CONSTANT
    else:
        body += (_CHANNEL if encoding.values == "channel" else _TABLE) + _END
        attributes += ["r"] if encoding.values == "channel" else []
    inputs.append("table")
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{function_name(encoding)} <{", ".join(attributes)}> '
        f"({', '.join(inputs)}) => (weight) {{{body}}}"
    )
    return ir.serde.deserialize_function(_minimal(parser.parse_function(text)))


def function_bytes(encoding: Encoding) -> int:
    """Return about how many bytes the decoder of such encodings takes in a file, once."""
    name = function_name(encoding)
    if name not in _SIZES:
        _SIZES[name] = len(ir.serde.serialize_function(function(encoding, 21)).SerializeToString())
    return _SIZES[name]


def _sparse(encoding: Encoding, attributes: list[str]) -> str:
    """Nonzeros to their places: picked by a running index through the mask, or scattered to where the gaps lead."""
    nonzeros = _CODED if encoding.code_bits else _PLAIN
    index = _ONE if encoding.values == "one" else _COUNT
    attributes.append("n")
    if encoding.positions == "mask":
        return _symbols("where", "n", 1, attributes) + index.format("where_symbols") + nonzeros + _PICK.format("flat")
    gaps = _symbols("where", "p", encoding.gap_bits, attributes) + _GAPS.format(2**encoding.gap_bits - 1)
    return gaps + index.format("real") + nonzeros + _PICK.format("updates") + _SCATTER


def _symbols(name: str, count: str, bits: int, attributes: list[str]) -> str:
    """Bytes → int32 symbols; the inverse of `torchopt.packing.to_parts`."""
    if bits == 8:
        return _SYMBOLS.format(name, name)
    if count not in attributes:
        attributes.append(count)
    body, whole = "", ""
    for number, (width, low) in enumerate(parts(bits)):
        part, source = f"{name}_{number}", name
        if width != bits:
            body, source = body + _ROWS.format(part, low, low + width, name), f"{part}_in"
        shifts = ", ".join(str(width * slot) for slot in range(8 // width))
        body += _PART.format(part, source, 8 // width, shifts, 2**width - 1)
        if number:
            body += _JOIN.format(part, low, whole)
        whole = f"{part}_joined" if number else f"{part}_value"
    return body + _CUT.format(name, count, whole) + _SYMBOLS.format(name, f"{name}_bytes")


def _minimal(proto: onnx.FunctionProto) -> onnx.FunctionProto:
    """Make the body short, for it is in every file: inner names of one or two letters, equal constants once, no Identity."""
    names = {name: name for name in (*proto.input, *proto.output)}
    seen: dict[bytes, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in proto.node:
        node.input[:] = [names[name] for name in node.input]
        content = b"".join(attribute.SerializeToString() for attribute in node.attribute)
        if node.op_type == "Identity":
            names[node.output[0]] = node.input[0]
        elif node.op_type == "Constant" and content in seen:
            names[node.output[0]] = seen[content]
        else:
            name = names.setdefault(node.output[0], f"_{len(seen) + len(nodes):x}")
            node.output[:] = [name]
            seen |= {content: name} if node.op_type == "Constant" else {}
            nodes.append(node)
    del proto.node[:]
    proto.node.extend(nodes)
    return proto
