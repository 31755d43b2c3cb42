"""Passes over an ONNX graph, one a file: each changes the form of what is computed, and none changes the numbers."""

from torchopt.export.passes.global_pool import GlobalPoolPass
from torchopt.export.passes.integer_weights import IntegerWeightsPass
from torchopt.export.passes.tidy import TidyPass

__all__ = ["GlobalPoolPass", "IntegerWeightsPass", "TidyPass"]
