"""The ONNX side of packing: one model-local function per codec, written in standard operators that ORT folds at load.

    symbols       bit planes → int32 symbols           BitwiseAnd, MatMul with 1, 2, 4, …
    positions     mask → running index                 CumSum
                  gaps → scattered index               CumSum, ScatterElements
    values        index → value                        Gather (a table a tensor), GatherElements (a table a channel)

ORT inlines a model-local function and folds its constants, so the decoded graph is the dense one. `NonZero` would not fold.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import parser

from torchopt.packing import Encoding

DOMAIN = "torchopt"

_BITS = """
  {0}_eight = Constant <value = uint8[8] {{128, 64, 32, 16, 8, 4, 2, 1}}> ()
  {0}_last = Constant <value_ints = [-1]> ()
  {0}_column = Unsqueeze ({0}, {0}_last)
  {0}_and = BitwiseAnd ({0}_column, {0}_eight)
  {0}_bool = Cast <to = 9> ({0}_and)
  {0}_float = Cast <to = 1> ({0}_bool)
  {0}_flat_shape = Constant <value_ints = [0, -1]> ()
  {0}_flat = Reshape ({0}_float, {0}_flat_shape)
  {0}_powers = Constant <value_floats = {2}> ()
  {0}_sum = MatMul ({0}_powers, {0}_flat)
  {0}_all = Cast <to = 6> ({0}_sum)
  {0}_start = Constant <value_ints = [0]> ()
  {0}_stop = Constant <value_ints: ints = @{1}> ()
  {0}_symbols = Slice ({0}_all, {0}_start, {0}_stop)
"""
_NARROW = """
  {0}_symbols = Cast <to = 6> ({0})
"""
_MASK = """
  zero_axis = Constant <value_int = 0> ()
  counted = CumSum (where_symbols, zero_axis)
  index = Mul (counted, where_symbols)
"""
_GAPS = """
  zero_axis = Constant <value_int = 0> ()
  filler = Constant <value = int32 {{{0}}}> ()
  one = Constant <value = int32 {{1}}> ()
  is_filler = Equal (where_symbols, filler)
  not_filler = Not (is_filler)
  real = Cast <to = 6> (not_filler)
  advance = Add (where_symbols, real)
  reached = CumSum (advance, zero_axis)
  place = Sub (reached, one)
  counted = CumSum (real, zero_axis)
  which = Mul (counted, real)
  size = Constant <value_ints: ints = @size> ()
  empty = ConstantOfShape <value = int32[1] {{0}}> (size)
  index = ScatterElements <axis = 0> (empty, place, which)
"""
_CODED = """
  first = Constant <value = int32[1] {0}> ()
  more = Constant <value = int32 {1}> ()
  shifted = Add (codes_symbols, more)
  known = Concat <axis = 0> (first, shifted)
  code = Gather (known, index)
"""
_ONE = """
  kept = Cast <to = 9> (index)
  code = Cast <to = 6> (kept)
"""
_RAW = """
  code = Identity (index)
"""
_ALL = """
  code = Identity (codes_symbols)
"""
_ZERO_FIRST = """
  values = Concat <axis = {1}> (zero, table)
"""
_TABLE = """
  flat = Gather ({0}, code)
"""
_CHANNEL = """
  rows = Constant <value_ints: ints = @rows> ()
  code_rows = Reshape (code, rows)
  flat = GatherElements <axis = 1> ({0}, code_rows)
"""
_END = """
  shape = Constant <value_ints: ints = @shape> ()
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
    sparse = encoding.positions != "all"
    inputs, attributes, body = [], ["shape"], ""
    if encoding.code_bits:
        inputs.append("codes")
        body += _symbols("codes", "count", encoding.code_bits, attributes)
    if sparse:
        inputs += ["where", "zero"]
        bits = 1 if encoding.positions == "mask" else encoding.gap_bits
        body += _symbols("where", "size" if encoding.positions == "mask" else "places", bits, attributes)
        body += _MASK if encoding.positions == "mask" else _GAPS.format(2**encoding.gap_bits - 1)
        if encoding.positions == "gaps":
            attributes.append("size")
        body += _CODED if encoding.code_bits else _ONE if encoding.values == "one" else _RAW
        body += _ZERO_FIRST.format("", 0)
    else:
        body += _ALL
    inputs.append("table")
    body += (_CHANNEL if encoding.values == "channel" else _TABLE).format("values" if sparse else "table")
    if encoding.values == "channel":
        attributes.append("rows")
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{function_name(encoding)} <{", ".join(attributes)}> '
        f"({', '.join(inputs)}) => (weight) {{{body}{_END}}}"
    )
    return ir.serde.deserialize_function(_minimal(parser.parse_function(text)))


def _symbols(name: str, count: str, bits: int, attributes: list[str]) -> str:
    if bits in (4, 8):
        return _NARROW.format(name)
    attributes.append(count)
    powers = ", ".join(f"{2.0**bit:.1f}" for bit in range(bits))
    return _BITS.format(name, count, f"[{powers}]")


def _minimal(proto: onnx.FunctionProto) -> onnx.FunctionProto:
    """Give the inner values names of one or two letters: they are written in every file."""
    names = {name: name for name in (*proto.input, *proto.output)}
    for node in proto.node:
        for output in node.output:
            names.setdefault(output, f"_{len(names)}")
        for values in (node.input, node.output):
            values[:] = [names[value] for value in values]
    return proto
