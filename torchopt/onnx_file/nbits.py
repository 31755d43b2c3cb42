"""Weights of 2, 4 or 8 bits, side by side in bytes and in blocks of inputs: ONNX Runtime's MatMulNBits and GatherBlockQuantized.

    w = (q − z) · s        q the codes, lowest bits first; s a scale a block; z a zero point a block, 2^(bits−1) where none is given

`MatMulNBits` has q as bytes (outputs, blocks, bytes of a block), the last block filled up; s and z as (outputs, blocks) or as one row
of numbers; z packed like q, each output by itself, or as floats. Its block runs along the inputs, which are the last axis of w here:
(outputs, inputs), as in torch. `GatherBlockQuantized` has q in the shape of the table, two or four to a byte along the last axis.
One decoder for all who look at such weights; what ONNX Runtime multiplies an identity with is the truth that it is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

KINDS = {"MatMulNBits": 1, "GatherBlockQuantized": 0}  # operator → which input is the weight
Lookup = Callable[[ir.Value | None], "np.ndarray | None"]


@dataclass(frozen=True, kw_only=True)
class BlockCodes:
    """A weight of codes in blocks.

    Attributes:
        codes: int16, of the weight's shape.
        zero: what stands for zero, spread over the same shape, in the type of the file's.
        scale: spread over the same shape.
        bits: of a code.
    """

    codes: np.ndarray
    zero: np.ndarray
    scale: np.ndarray
    bits: int

    @property
    def symbols(self) -> np.ndarray:
        """The codes with zero at zero, where zero is a code."""
        return self.codes - self.zero.astype(np.int16) if self.zero.dtype.kind in "iu" else self.codes

    @property
    def values(self) -> np.ndarray:
        """What the weight stands for, float32."""
        return (self.codes.astype(np.float32) - self.zero.astype(np.float32)) * self.scale.astype(np.float32)


def block_codes(node: ir.Node, lookup: Lookup) -> BlockCodes | None:
    """Return the weight of a node of these kinds; None for other nodes, and where an operand is no constant.

    Args:
        node: the node.
        lookup: the constant that a value is, or None.

    Raises:
        ValueError: the operands do not fit one another, or the node reorders its groups.
    """
    if node.op_type not in KINDS or node.domain != "com.microsoft":
        return None
    operands = [lookup(value) for value in node.inputs]
    return _of_matmul(node, operands) if node.op_type == "MatMulNBits" else _of_gather(node, operands)


def unpacked(stored: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes, uint8, that bytes hold along their last axis, the lowest bits first.

    Example:
        >>> unpacked(np.array([[0x21, 0xF3]], np.uint8), 4).tolist()
        [[1, 2, 3, 15]]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = stored[..., None] >> shifts & np.uint8(2**bits - 1)
    return codes.reshape(*stored.shape[:-1], -1)


def _of_matmul(node: ir.Node, operands: list[np.ndarray | None]) -> BlockCodes | None:
    stored, scale = operands[1], operands[2]
    zero = operands[3] if len(operands) > 3 else None
    given = [value is not None for value in node.inputs] + [False] * 5
    if stored is None or scale is None or (given[3] and zero is None):
        return None
    if given[4]:
        raise ValueError("MatMulNBits with a group index, which ONNX Runtime has given up")
    outputs, inputs, block = (node.attributes[key].as_int() for key in ("N", "K", "block_size"))
    bits = _int(node, "bits", 4)
    blocks = -(-inputs // block)
    codes = unpacked(stored.reshape(outputs, -1), bits)
    if codes.shape != (outputs, blocks * block):
        raise ValueError(f"codes {codes.shape} for {outputs} × {inputs} weights in blocks of {block}")
    if zero is None:
        zero = np.full((outputs, blocks), 2 ** (bits - 1), np.uint8)
    elif zero.dtype == np.uint8:
        zero = unpacked(zero.reshape(outputs, -1), bits)[:, :blocks]

    def spread(array: np.ndarray) -> np.ndarray:
        return array.reshape(outputs, blocks).repeat(block, axis=1)[:, :inputs]

    return BlockCodes(codes=codes[:, :inputs].astype(np.int16), zero=spread(zero), scale=spread(scale), bits=bits)


def _of_gather(node: ir.Node, operands: list[np.ndarray | None]) -> BlockCodes | None:
    stored, scale = operands[0], operands[2]
    zero = operands[3] if len(operands) > 3 else None
    if stored is None or scale is None or (zero is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    block, axis = _int(node, "block_size", 128), _int(node, "quantize_axis", 1)
    in_bytes = stored.dtype == np.uint8  # else of the type int4 or uint4, one element a code
    bits = _int(node, "bits", 4) if in_bytes else 4
    codes = unpacked(stored, bits) if in_bytes else stored
    if zero is None:
        zero = np.full(scale.shape, 2 ** (bits - 1) if in_bytes else 0, np.uint8)
    elif in_bytes:
        zero = unpacked(zero, bits)

    def spread(array: np.ndarray) -> np.ndarray:
        wide = array.repeat(block, axis=axis)
        return wide[tuple(slice(size) for size in codes.shape)]

    zero, scale = spread(zero.astype(np.int16)), spread(scale)
    if not codes.shape == zero.shape == scale.shape:
        raise ValueError(f"codes {codes.shape} with scales {scale.shape} in blocks of {block}")
    return BlockCodes(codes=codes.astype(np.int16), zero=zero, scale=scale, bits=bits)


def _int(node: ir.Node, key: str, default: int) -> int:
    return node.attributes[key].as_int() if key in node.attributes else default
