"""Packing: tensors in fewer bytes, lossless, numpy only; `torchopt.pack.pack` writes the encodings as ONNX."""

from torchopt.codecs.bits import from_pairs, from_parts, in_pairs, padded, parts, to_parts
from torchopt.codecs.encode import CALL_BYTES, encode, encodings
from torchopt.codecs.encoding import Encoding, decode, entropy_bytes
from torchopt.codecs.positions import from_gaps, gaps

__all__ = [
    "CALL_BYTES",
    "Encoding",
    "decode",
    "encode",
    "encodings",
    "entropy_bytes",
    "from_gaps",
    "from_pairs",
    "from_parts",
    "gaps",
    "in_pairs",
    "padded",
    "parts",
    "to_parts",
]
