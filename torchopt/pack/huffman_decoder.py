"""The operators that decode one Huffman stream: `torchopt.codecs.huffman.decompress` in ONNX, for all lanes and symbols at once.

    h8          one stream → symbols
    x1          (jumps, places) → (jumps twice as far, places and the ones that the jumps lead to)
    x3, x9      the same three times, nine times: 512 places of each lane

The table of a code is made of the lengths alone: a window belongs to as many symbols less one as begin at or before it. All numbers
are integers of 8 and 32 bits; shifts stay below eight bits. ONNX Runtime folds all of it at load. Every byte of the text is in every
file: the attributes that ONNX takes for granted are left out.
"""

from __future__ import annotations

from torchopt.codecs.huffman import LANE

OLDEST = 18  # the opset from which on streams can be decoded: that of BitwiseOr

_FURTHER = """(jump, places) => (further, more) {
  further = GatherElements (jump, jump)
  reached = GatherElements (jump, places)
  more = Concat <axis = 0> (places, reached)
}"""
_THRICE = """(jump, places) => (further, more) {{
  jump1, places1 = torchopt.x{0} (jump, places)
  jump2, places2 = torchopt.x{0} (jump1, places1)
  further, more = torchopt.x{0} (jump2, places2)
}}"""
_STREAM = f"""(data, lanes, base, order, free, count) => (wanted) {{
  zero = Constant <value = int32 {{0}}> ()
  one = Constant <value = int32 {{1}}> ()
  bit = Constant <value = uint8 {{1}}> ()
  slots = BitShift <direction = "LEFT"> (bit, free)
  slots_number = Cast <to = 6> (slots)
  ends = CumSum (slots_number, zero)
  column = Constant <value_ints = [-1, 1]> ()
  ends_column = Reshape (ends, column)
  windows = Constant <value = int32 {{256}}> ()
  every = Range (zero, windows, one)
  passed = LessOrEqual (ends_column, every)
  passed_number = Cast <to = 6> (passed)
  axis = Constant <value_ints = [0]> ()
  which = ReduceSum <keepdims = 0> (passed_number, axis)
  symbol_of = GatherElements (order, which)
  free_of = GatherElements (free, which)
  line = Constant <value_ints = [-1]> ()
  but_last = Slice (data, axis, line)
  second = Constant <value_ints = [1]> ()
  behind = Shape (data)
  but_first = Slice (data, second, behind)
  bytes = Reshape (but_last, column)
  half = BitShift <direction = "RIGHT"> (but_first, bit)
  next_bytes = Reshape (half, column)
  up = Constant <value = uint8[1, 8] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
  down = Constant <value = uint8[1, 8] {{7, 6, 5, 4, 3, 2, 1, 0}}> ()
  high = BitShift <direction = "LEFT"> (bytes, up)
  low = BitShift <direction = "RIGHT"> (next_bytes, down)
  rows = BitwiseOr (high, low)
  flat = Reshape (rows, line)
  window = Cast <to = 6> (flat)
  free_here = GatherElements (free_of, window)
  free_number = Cast <to = 6> (free_here)
  number = Size (window)
  bits = Cast <to = 6> (number)
  eight = Constant <value = int32 {{8}}> ()
  beyond = Add (bits, eight)
  place = Range (eight, beyond, one)
  reached = Sub (place, free_number)
  last = Sub (bits, one)
  jump = Min (reached, last)
  lane_number = Cast <to = 7> (lanes)
  lane_bits = Add (lane_number, base)
  lane_starts = CumSum <exclusive = 1> (lane_bits, zero)
  starts = Cast <to = 6> (lane_starts)
  far, places = torchopt.x9 (jump, starts)
  found = GatherElements (window, places)
  symbols = GatherElements (symbol_of, found)
  steps = Constant <value_ints = [{LANE}, -1]> ()
  by_step = Reshape (symbols, steps)
  by_lane = Transpose (by_step)
  in_order = Reshape (by_lane, line)
  wanted = Slice (in_order, axis, count)
}}"""


def stream_block(name: str) -> str:
    """Return head and body of the function with this name."""
    return {"h8": _STREAM, "x1": _FURTHER, "x3": _THRICE.format(1), "x9": _THRICE.format(3)}[name]
