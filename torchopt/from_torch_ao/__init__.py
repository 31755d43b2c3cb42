"""The way in for networks that `torch.ao.quantization` has quantized: their integers, in a network that exports to ONNX."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao announces its removal on import; the announcement is known
    from torchopt.from_torch_ao.convert import from_torch_ao

__all__ = ["from_torch_ao"]
