"""Quantization: integer grids for weights and activations, for training and after it; the only package that imports torch.ao."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao announces its removal on import; the announcement is known
    from torchopt.quantize.activations import ActivationQuantizer, FixedQuantize
    from torchopt.quantize.attach import attach, left_float, settle_scales, update
    from torchopt.quantize.bake import bake
    from torchopt.quantize.calibrate import calibrate, observes, synchronize
    from torchopt.quantize.config import Quantize
    from torchopt.quantize.dynamic import DynamicLinear

__all__ = [
    "ActivationQuantizer",
    "DynamicLinear",
    "FixedQuantize",
    "Quantize",
    "attach",
    "bake",
    "calibrate",
    "left_float",
    "observes",
    "settle_scales",
    "synchronize",
    "update",
]
