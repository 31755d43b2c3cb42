"""Layers swapped where they stand, without a graph: for the modes that need none, and inside modules that cannot be traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from torchopt.network.surgery import get_module, set_module
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.bare_weights import round_later
from torchopt.quantize.layers.float_layers import fused
from torchopt.quantize.layers.input_rounded import rounded, rounded_class
from torchopt.quantize.layers.recurrent import RECURRENT
from torchopt.quantize.targets import Target


def in_place(model: nn.Module, path: str, config: Quantize, runtime: Target, params: Sequence[str] = ()) -> nn.Module:
    """Swap one module for its quantized layer, where it has one; else its weights are snapped when baked."""
    module = get_module(model, path)
    bits = runtime.weight_bits(config)
    layer: nn.Module | None = None
    if config.mode == "static":
        layer = rounded(module, config, bits, runtime)
    elif config.mode != "float16":
        recurrent = RECURRENT.get(type(module))
        layer = recurrent.of(module, config, bits) if recurrent else fused(module, config, bits)
    if layer is None:
        round_later(module, config, bits, params)
        return model
    if not path:
        return layer
    set_module(model, path, layer)
    return model


def without_graph(module: nn.Module, config: Quantize) -> Quantize:
    """What is left of static quantization for a module that no graph shows: both ends of a layer on grids, or the weights alone."""
    graph_only = {"rounding": "nearest", "equalize": False, "bias_correction": False, "fallback": None}
    if rounded_class(module) is not None:
        return replace(config, **graph_only)  # type: ignore[arg-type]
    return replace(config, mode="weight_only", activation_bits=8, **graph_only)  # type: ignore[arg-type]


def twins(model: nn.Module, assignment: dict[str, Quantize]) -> dict[str, Quantize]:
    """The modules that use the same Parameter as an assigned one (a decoder tied to the embedding), with its configuration."""
    firsts = {
        id(w): config for p, config in assignment.items() if (w := model.get_submodule(p)._parameters.get("weight")) is not None
    }
    weights = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    return {path: firsts[id(w)] for path, w in weights.items() if id(w) in firsts and path not in assignment}
