"""Packing: weights as codes, tables, masks and gaps, which ONNX Runtime decodes at load; and the proof that nothing changed."""

from torchopt.pack.pack import decode_initializers, pack, unpack
from torchopt.pack.report import PackReport

__all__ = ["PackReport", "decode_initializers", "pack", "unpack"]
