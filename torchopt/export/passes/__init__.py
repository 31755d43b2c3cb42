"""Passes over an ONNX graph, one a file: each changes the form of what is computed, and none changes the numbers."""

from torchopt.export.passes.dynamic_matmul import DynamicMatMulPass
from torchopt.export.passes.global_pool import GlobalPoolPass
from torchopt.export.passes.hard_sigmoid import HardSigmoidPass
from torchopt.export.passes.keep_apart import KeepApartPass
from torchopt.export.passes.keep_float import KeepFloatPass
from torchopt.export.passes.late_bias import LateBiasPass
from torchopt.export.passes.late_dequantize import LateDequantizePass
from torchopt.export.passes.partial_windows import PartialWindowsPass
from torchopt.export.passes.redundant_activations import RedundantActivationsPass
from torchopt.export.passes.tidying.default_attributes import DefaultAttributesPass
from torchopt.export.passes.tidying.short_names import ShortNamesPass
from torchopt.export.passes.tidying.static_shapes import StaticShapesPass
from torchopt.export.passes.tidying.tidy import TidyPass
from torchopt.export.passes.weights.block_weights import BlockWeightsPass
from torchopt.export.passes.weights.half_weights import HalfWeightsPass
from torchopt.export.passes.weights.integer_transposed import IntegerTransposedPass
from torchopt.export.passes.weights.integer_weights import IntegerWeightsPass
from torchopt.export.passes.weights.own_weights import OwnWeightsPass
from torchopt.export.passes.wide_channels import WideChannelsPass

__all__ = [
    "BlockWeightsPass",
    "DefaultAttributesPass",
    "DynamicMatMulPass",
    "GlobalPoolPass",
    "HalfWeightsPass",
    "HardSigmoidPass",
    "IntegerTransposedPass",
    "IntegerWeightsPass",
    "KeepApartPass",
    "KeepFloatPass",
    "LateBiasPass",
    "LateDequantizePass",
    "OwnWeightsPass",
    "PartialWindowsPass",
    "RedundantActivationsPass",
    "ShortNamesPass",
    "StaticShapesPass",
    "TidyPass",
    "WideChannelsPass",
]
