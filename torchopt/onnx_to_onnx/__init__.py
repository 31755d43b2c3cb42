"""ONNX in, ONNX out: smaller weights for a file whose source is not at hand."""

from torchopt.onnx_to_onnx.compress import CompressedFile, compress_onnx
from torchopt.onnx_to_onnx.likeness import Likeness

__all__ = ["CompressedFile", "Likeness", "compress_onnx"]
