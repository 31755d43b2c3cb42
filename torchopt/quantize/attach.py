"""Put a model on integer grids: for training, or for calibration alone; the prepared form is the same.

static        trace → fuse → place quantizers            weights and activations
dynamic       swap layers in place, no tracing            linear layers: weights, and activations on their range in each call
weight_only   swap layers in place, no tracing            weights alone, in any module
float16       weights rounded to half precision at the end
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchopt.errors import ModelError, StateError
from torchopt.quantize.activations import ActivationQuantizer
from torchopt.quantize.blocks import FusedBlockLinear
from torchopt.quantize.config import Quantize
from torchopt.quantize.corrections import check
from torchopt.quantize.dynamic import FusedDynamicLinear
from torchopt.quantize.fuse import fuse
from torchopt.quantize.layers import fused
from torchopt.quantize.modules import Fused
from torchopt.quantize.placement import place
from torchopt.quantize.recurrent import RECURRENT, QuantizedRecurrent
from torchopt.quantize.targets import Target, target_named
from torchopt.quantize.trace import trace
from torchopt.quantize.weight_grid import settle
from torchopt.surgery import get_module, set_module

WEIGHTS_LATER = "_torchopt_weights_later"  # modules whose weights are snapped when baked, and not before


def attach(
    model: nn.Module, assignment: dict[str, Quantize], example_inputs: tuple[Any, ...] | None, *, target: str = "ort-x86"
) -> nn.Module:
    """Return `model` with fake quantizers; it is changed in place where it is not traced.

    Args:
        model: a network that may be changed.
        assignment: what each module (by path) gets.
        example_inputs: one call's positional arguments; needed for static quantization, which runs the traced model once.
        target: the runtime.

    Raises:
        ConfigError: an unknown target, or a mode that is not there.
        ModelError: the model cannot be traced, or takes other inputs.
        StateError: example inputs are missing.
    """
    runtime = target_named(target)
    static = {path: config for path, config in assignment.items() if config.mode == "static"}
    if static:
        model = _static(model, static, example_inputs, runtime)
    there = dict(model.named_modules())
    untraced = {path: config for path, config in assignment.items() if config.mode != "static" and path in there}
    for path, config in (_twins(model, untraced) | untraced).items():
        model = _in_place(model, path, config, runtime)
    return model


def update(model: nn.Module, step: int) -> bool:
    """After optimizer step `step`: pass the milestones that are due. True where something is quantized."""
    parts = [m for m in model.modules() if isinstance(m, Fused | ActivationQuantizer)]
    for part in parts:
        milestones = part.config.milestones if isinstance(part, Fused) else getattr(part, "milestones", None)
        if milestones is None:
            continue
        rounds, freezes, norms = milestones
        if step == rounds:
            part.enable_fake_quant()
        if step == freezes and isinstance(part, ActivationQuantizer):
            part.disable_observer()
        if step == norms and isinstance(part, Fused) and part.bn is not None:
            part.freeze_bn()
    return bool(parts)


def left_float(model: nn.Module, assignment: dict[str, Quantize]) -> dict[str, str]:
    """Return why, by path, of the assigned modules that get less than was asked for; the report says so."""
    modules = dict(model.named_modules())
    reasons = {path: _less(modules.get(path), config) for path, config in assignment.items()}
    return {path: reason for path, reason in reasons.items() if reason}


def _less(module: nn.Module | None, config: Quantize) -> str:
    """What a module lacks of its configuration; empty where it lacks nothing."""
    if module is None or not (isinstance(module, Fused | QuantizedRecurrent) or WEIGHTS_LATER in module.__dict__):
        return "the traced graph does not call it as a layer of a known class; it stays float (mode='weight_only' reaches it)"
    if config.mode == "static" and (mode := _mode(module)) not in ("", "static"):
        does = "its input is rounded at run time" if mode == "dynamic" else "its weights are integers, its activations stay float"
        return f"the module around it cannot be traced; {does}, as with mode={mode!r}"
    if config.mode == "dynamic" and not isinstance(module, FusedDynamicLinear):
        return "only linear layers round their input at run time; its weights are integers, its activations stay float"
    if config.block_size is not None and not isinstance(module, FusedBlockLinear):
        blocks = (
            f"its {module.in_features} inputs are no multiple of" if isinstance(module, nn.Linear) else "only linear layers have"
        )
        return f"{blocks} block_size={config.block_size}; it has one scale a channel"
    return ""


def _mode(module: nn.Module) -> str:
    """The mode in which a module is quantized."""
    config = module.__dict__[WEIGHTS_LATER][0] if WEIGHTS_LATER in module.__dict__ else module.config
    return config.mode if isinstance(config, Quantize) else ""


def settle_scales(model: nn.Module) -> None:
    """After tables were attached: decide which weights have one scale for the whole tensor because their values are shared."""
    for module in model.modules():
        module.__dict__.pop("_shares", None)  # the trial call decided before there were tables
        if isinstance(module, Fused):
            settle(module, "weight")
        elif isinstance(module, QuantizedRecurrent):
            for param in module._flat_weights_names:
                settle(module, param)


def _static(
    model: nn.Module, assignment: dict[str, Quantize], example_inputs: tuple[Any, ...] | None, runtime: Target
) -> nn.Module:
    if example_inputs is None:
        raise StateError("prepare: static quantization traces the model; give example_inputs=(x,), one call's arguments")
    traced, leaves = trace(model)
    left = fuse(traced, assignment, runtime)
    inner = {path: _untraced(traced, path, assignment[path]) for path in left if path.startswith(tuple(f"{x}." for x in leaves))}
    if len(left) == len(assignment) and not inner:
        raise ModelError(
            f"quantize: none of {list(assignment)[:3]} is called as a layer of a known class; use mode='dynamic' or 'weight_only'"
        )
    check(traced)
    place(traced, assignment, runtime)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    for path, config in inner.items():
        _in_place(traced, path, config, runtime)
    if next(iter(assignment.values())).milestones is not None:
        for part in traced.modules():
            if isinstance(part, Fused | ActivationQuantizer):
                part.enable_fake_quant(False)
    _try(traced, example_inputs)
    return traced


def _untraced(model: nn.Module, path: str, config: Quantize) -> Quantize:
    """What a layer gets inside a module that cannot be traced: a linear one dynamic activations, another none."""
    mode = "dynamic" if type(get_module(model, path)) is nn.Linear else "weight_only"
    static_only = {"rounding": "nearest", "equalize": False, "bias_correction": False, "activation_bits": 8, "fallback": None}
    return replace(config, mode=mode, **static_only)  # type: ignore[arg-type]


@torch.no_grad()
def _try(traced: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """One call in evaluation mode, before any quantizer has seen data: it must run."""
    training = traced.training
    try:
        traced.eval()(*example_inputs)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"quantize: the traced model does not take the example inputs: {str(error).splitlines()[0]}") from error
    traced.train(training)


def _twins(model: nn.Module, assignment: dict[str, Quantize]) -> dict[str, Quantize]:
    """The modules that use the same Parameter as an assigned one (a decoder tied to the embedding), with its configuration."""
    firsts = {
        id(w): config for p, config in assignment.items() if (w := model.get_submodule(p)._parameters.get("weight")) is not None
    }
    weights = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    return {path: firsts[id(w)] for path, w in weights.items() if id(w) in firsts and path not in assignment}


def _in_place(model: nn.Module, path: str, config: Quantize, runtime: Target) -> nn.Module:
    """Swap one module for its quantized layer, where it has one; else its weights are snapped when baked."""
    module = get_module(model, path)
    bits = runtime.weight_bits(config)
    layer: nn.Module | None = None
    if config.mode != "float16":
        recurrent = RECURRENT.get(type(module))
        layer = recurrent.of(module, config, bits) if recurrent else fused(module, config, bits)
    if layer is None:
        module.__dict__[WEIGHTS_LATER] = (config, bits)
        return model
    if isinstance(layer, Fused) and config.milestones is not None:
        layer.enable_fake_quant(False)
    if not path:
        return layer
    set_module(model, path, layer)
    return model
