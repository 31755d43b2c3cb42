"""The small functions that decoders call: bytes to symbols (s), gap symbols to places (g), one more bit for codes at places (p).

They are written in ONNX's text form. With opset 21 a part of four bits is a UINT4 tensor, which one Cast turns into bytes; before, it
is unpacked like the parts of two bits and one (torchopt/codecs/bits.py). The last of the symbols of 6 and 7 bits, whose bits lie above
the others, come out of one MatMulInteger with the powers of two. Before opset 18 there are no bitwise operators: Mod masks, Add joins.
"""

from __future__ import annotations

from torchopt.codecs import parts
from torchopt.pack.huffman_decoder import stream_block

FOUR_BITS = 21  # the opset of UINT4
BITWISE = 18  # of BitwiseAnd and BitwiseOr
ADDS_AT_PLACES = 16  # of ScatterElements with a reduction

_ROW_OF_BYTES = """
  line = Constant <value_ints = [1, -1]> ()
  row = Reshape (bytes, line)
  shifts = Constant <value = uint8[{slots}, 1] {{{shifts}}}> ()
  shifted = BitShift <direction = "RIGHT"> (row, shifts)
  mask = Constant <value = uint8 {{{mask}}}> ()
  bits = {masked} (shifted, mask)
  flat = Constant <value_ints = [-1]> ()
  symbols = Reshape (bits, flat)
"""
_TWO_ROWS = """
  first = Constant <value_ints = [0]> ()
  middle = Constant <value_ints = [{middle}]> ()
  last = Constant <value_ints = [{last}]> ()
  low_rows = Slice (bytes, first, middle)
  low = torchopt.s{middle} (low_rows)
  rest = Slice (bytes, middle, last)
"""
_SPREAD = """
  rows_shape = Constant <value_ints = [{rows}, -1]> ()
  rows = Reshape (bytes, rows_shape)
  mask = Constant <value = uint8 {{{mask}}}> ()
  low = {masked} (rows, mask)
  shift = Constant <value = uint8 {{{bits}}}> ()
  above = BitShift <direction = "RIGHT"> (rows, shift)
  weights = Constant <value = uint8[1, {rows}] {{{weights}}}> ()
  sums = MatMulInteger (weights, above)
  last = Cast <to = 2> (sums)
  all = Concat <axis = 0> (low, last)
  flat = Constant <value_ints = [-1]> ()
  symbols = Reshape (all, flat)
"""
_JOINED = """
  above = torchopt.s{above} (rest)
  place = Constant <value = uint8 {{{low}}}> ()
  high = BitShift <direction = "LEFT"> (above, place)
"""
_OR = """
  symbols = BitwiseOr (low, high)
"""
_SUM = """
  low_number = Cast <to = 6> (low)
  high_number = Cast <to = 6> (high)
  sum = Add (low_number, high_number)
  symbols = Cast <to = 2> (sum)
"""
CUT = """
  start = Constant <value_ints = [0]> ()
  {1} = Slice ({0}, start, {2})
"""
_PLACES = """
  gap = Cast <to = 6> (symbols)
  filler = Constant <value = int32 {{{0}}}> ()
  is_real = Less (gap, filler)
  real = Cast <to = 6> (is_real)
  advance = Add (gap, real)
  axis = Constant <value_int = 0> ()
  reached = CumSum (advance, axis)
  one = Constant <value = int32 {{1}}> ()
  place = Sub (reached, one)
"""
_PLANE = """
  bit = Constant <value_int: int = @k> ()
  bit_place = Cast <to = 2> (bit)
  flag = Cast <to = 2> (real)
  added = BitShift <direction = "LEFT"> (flag, bit_place)
  more = ScatterElements <axis = 0, reduction = "add"> (codes, place, added)
"""


def block(name: str, opset: int) -> str:
    """Return head and body of the function with this name.

    Args:
        name: a letter and a width, as "s3".
        opset: of the model.
    """
    kind, bits = name[0], int(name[1:])
    if kind in "hx":
        return stream_block(name)
    if kind == "g":
        return f"(symbols) => (place, real) {{{_PLACES.format(2**bits - 1)}}}"
    if kind == "p":
        return f"<k> (codes, symbols) => (more) {{place, real = torchopt.g{bits} (symbols){_PLANE}}}"
    return f"({'low, rest' if in_two(bits, opset) else 'bytes'}) => (symbols) {{{_unpacked(bits, opset)}}}"


def in_two(bits: int, opset: int) -> bool:
    """Whether a stream of symbols is two tensors: the four-bit parts as UINT4, and the rest."""
    return opset >= FOUR_BITS and bits == 5


def filled(bits: int, opset: int) -> bool:
    """Whether a stream of symbols is filled up to a multiple of eight, so that its length has to be told."""
    return bits != 8 and not (opset >= FOUR_BITS and bits == 4)


def inputs(name: str, bits: int, opset: int) -> list[str]:
    """Return the names of the tensors of a stream."""
    return [name, f"{name}_rest"] if in_two(bits, opset) else [name]


def symbols(name: str, bits: int, opset: int) -> tuple[str, str]:
    """Return the steps that make uint8 symbols of a stream, and what they are called then.

    ORT takes no UINT4 for an operand of a function that another calls, so the Cast is the caller's.
    """
    if bits == 8:
        return "", name
    if opset < FOUR_BITS or bits not in (4, 5):
        return f"{name}_symbols = torchopt.s{bits} ({name})\n", f"{name}_symbols"
    low = f"{name}_low = Cast <to = 2> ({name})\n"
    if bits == 4:
        return low, f"{name}_low"
    return low + f"{name}_symbols = torchopt.s{bits} ({name}_low, {name}_rest)\n", f"{name}_symbols"


def _unpacked(bits: int, opset: int) -> str:
    """Bytes → symbols; the inverse of `torchopt.codecs.to_parts`."""
    masked, mask = ("BitwiseAnd", 2**bits - 1) if opset >= BITWISE else ("Mod", 2**bits)
    if bits > 5:
        rows, spare = bits // (8 - bits), 8 - bits
        weights = ", ".join(str(2 ** (spare * row)) for row in range(rows))
        return _SPREAD.format(rows=rows, masked=masked, mask=mask, bits=bits, weights=weights)
    low = parts(bits)[0][0]
    if low == bits:
        shifts = ", ".join(str(bits * slot) for slot in range(8 // bits))
        return _ROW_OF_BYTES.format(slots=8 // bits, shifts=shifts, masked=masked, mask=mask)
    first = "" if in_two(bits, opset) else _TWO_ROWS.format(middle=low, last=bits)
    return first + _JOINED.format(above=bits - low, low=low) + (_OR if opset >= BITWISE else _SUM)
