"""The way in for networks that `torch.ao.quantization` has quantized: their integers, in a network that exports to ONNX."""

from torchopt.from_torch_ao.convert import from_torch_ao

__all__ = ["from_torch_ao"]
