"""Quantization: integer grids for weights and activations, for training and after it; the only package that imports torch.ao."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.ao announces its removal on import; the announcement is known
    from torchopt.quantize.activations import ActivationQuantizer, FixedQuantize
    from torchopt.quantize.attach import attach, left_float, settle_scales, unrounded, update
    from torchopt.quantize.attention import can_open, open_attentions
    from torchopt.quantize.bake import bake
    from torchopt.quantize.cache import load_ranges, save_ranges
    from torchopt.quantize.calibrate import calibrate, observes, synchronize
    from torchopt.quantize.config import Quantize
    from torchopt.quantize.dynamic import DynamicLinear
    from torchopt.quantize.functional import beside
    from torchopt.quantize.harm import harms
    from torchopt.quantize.kernels import IntegerKernel, link_kernels
    from torchopt.quantize.read import round_for_readers, stop_rounding
    from torchopt.quantize.rounded import Rounded

__all__ = [
    "ActivationQuantizer",
    "DynamicLinear",
    "FixedQuantize",
    "IntegerKernel",
    "Quantize",
    "Rounded",
    "attach",
    "bake",
    "beside",
    "calibrate",
    "can_open",
    "harms",
    "left_float",
    "link_kernels",
    "load_ranges",
    "observes",
    "open_attentions",
    "round_for_readers",
    "save_ranges",
    "settle_scales",
    "stop_rounding",
    "synchronize",
    "unrounded",
    "update",
]
