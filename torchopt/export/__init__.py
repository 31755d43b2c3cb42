"""Export: a torch module as one small ONNX file, and packing for any ONNX file."""

from torchopt.export.export import export
from torchopt.export.result import ExportResult
from torchopt.onnx_file.ort_format import OrtFiles, to_ort
from torchopt.pack.pack import decode_initializers, pack, unpack
from torchopt.pack.report import PackReport

__all__ = ["ExportResult", "OrtFiles", "PackReport", "decode_initializers", "export", "pack", "to_ort", "unpack"]
