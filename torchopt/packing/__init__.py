"""Packing: tensors in fewer bytes, lossless, numpy only; `torchopt.export.pack` writes the encodings as ONNX."""

from torchopt.packing.bits import from_planes, to_planes
from torchopt.packing.codec import Encoding, decode, encode
from torchopt.packing.positions import from_gaps, gaps

__all__ = ["Encoding", "decode", "encode", "from_gaps", "from_planes", "gaps", "to_planes"]
