"""Export: a torch module as one small ONNX file, and packing for any ONNX file."""

from torchopt.export.export import ExportResult, export
from torchopt.export.ort_format import OrtFiles, to_ort
from torchopt.export.pack import decode_initializers, pack, unpack
from torchopt.export.pack_report import PackReport

__all__ = ["ExportResult", "OrtFiles", "PackReport", "decode_initializers", "export", "pack", "to_ort", "unpack"]
