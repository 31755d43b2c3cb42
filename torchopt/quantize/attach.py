"""Put a model on integer grids: for training, or for calibration alone; the prepared form is the same.

static        trace → fuse → place quantizers            weights and activations
dynamic       swap layers in place, no tracing            linear layers: weights, and activations on their range in each call
weight_only   swap layers in place, no tracing            weights alone, in any module
float16       weights rounded to half precision at the end
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from torchopt.network.marks import marked, unmark
from torchopt.network.weights import IN_PROJECTION
from torchopt.quantize.config import Quantize
from torchopt.quantize.graph.naming import name_of_value
from torchopt.quantize.in_place import in_place, twins
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.attention import open_attentions
from torchopt.quantize.layers.bare_weights import WEIGHTS_LATER, weights_later
from torchopt.quantize.layers.blocks import FusedBlockLinear
from torchopt.quantize.layers.dynamic import FusedDynamicLinear
from torchopt.quantize.layers.float_layers import LEFT
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.recurrent import QuantizedRecurrent
from torchopt.quantize.layers.weight_grid import SHARES, settle
from torchopt.quantize.static import static
from torchopt.quantize.targets import target_named

PARTS = (Fused, ActivationQuantizer, QuantizedRecurrent)  # what rounds in training


def attach(
    model: nn.Module,
    assignment: dict[str, Quantize],
    example_inputs: tuple[Any, ...] | None,
    *,
    target: str = "ort-x86",
    params: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Return `model` with fake quantizers; it is changed in place where it is not traced.

    Args:
        model: a network that may be changed.
        assignment: what each module (by path) gets.
        example_inputs: one call's positional arguments; needed for static quantization, which runs the traced model once.
        target: the runtime.
        params: Parameters of custom modules, by the module's path, that are weights too.

    Raises:
        ConfigError: an unknown target, or a mode that is not there.
        ModelError: the model cannot be traced, or takes other inputs.
        StateError: example inputs are missing.
    """
    runtime, device = target_named(target), next((p.device for p in model.parameters()), None)
    on_graph = {path: config for path, config in assignment.items() if config.mode == "static"}
    if on_graph:
        model = static(model, on_graph, example_inputs, runtime)
    there = dict(model.named_modules())
    dynamic = {path: config for path, config in assignment.items() if config.mode == "dynamic" and path in there}
    model, dynamic = open_attentions(model, dynamic)
    others = {path: config for path, config in assignment.items() if config.mode not in ("static", "dynamic") and path in there}
    untraced = dynamic | others
    for path, config in (twins(model, untraced) | untraced).items():
        model = in_place(model, path, config, runtime, (params or {}).get(path, ()))
    _begin(model)
    for part in model.modules():
        if isinstance(part, ActivationQuantizer):  # made on the CPU; torch's operators want range and data on one device
            part.to(device)
    return model


def update(model: nn.Module, step: int) -> bool:
    """After optimizer step `step`: pass the milestones that are due. True where something is quantized."""
    parts = _parts(model)
    for part in parts:
        milestones = _milestones(part)
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


def unrounded(model: nn.Module, step: int) -> str:
    """What does not round yet, though `finalize` will: where its milestone stands; empty where all rounds."""
    for name, part in model.named_modules():
        if isinstance(part, PARTS) and not part.rounding:
            begins = _milestones(part)
            when = f" before step {begins[0]} (Quantize.milestones)" if begins is not None and begins[0] > step else ""
            what = name_of_value(model, name) if isinstance(part, ActivationQuantizer) else name
            return f"{what} is not rounded{when}"
    return ""


def _begin(model: nn.Module) -> None:
    """Let every part wait for its own milestones, and pass those at step 0."""
    for part in _parts(model):
        milestones = _milestones(part)
        if milestones is not None:
            part.enable_fake_quant(False)
    update(model, 0)


def _parts(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, PARTS)]


def _milestones(part: Any) -> Sequence[int] | None:
    return getattr(part, "milestones", None) if isinstance(part, ActivationQuantizer) else part.config.milestones


def left_float(model: nn.Module, assignment: dict[str, Quantize]) -> dict[str, str]:
    """Return why, by path, of the assigned modules that get less than was asked for; the report says so."""
    modules = dict(model.named_modules())
    reasons = {path: _less(modules.get(f"{path}.{IN_PROJECTION}", modules.get(path)), c) for path, c in assignment.items()}
    return {path: reason for path, reason in reasons.items() if reason}


def _less(module: nn.Module | None, config: Quantize) -> str:
    """What a module lacks of its configuration; empty where it lacks nothing."""
    if module is not None and marked(module, LEFT):
        return str(marked(module, LEFT))
    if module is None or not (isinstance(module, Fused | QuantizedRecurrent) or marked(module, WEIGHTS_LATER)):
        return "the traced graph does not call it as a layer of a known class; it stays float (mode='weight_only' reaches it)"
    return "; ".join(_lacks(module, config))


def _lacks(module: nn.Module, config: Quantize) -> Iterator[str]:
    """What is missing in a module whose weights are integers."""
    if config.mode == "static" and _mode(module) == "weight_only":
        yield "the graph shows no layer of a known class; its weights are integers, its activations stay float, as with mode='weight_only'"
    if config.mode == "dynamic" and not isinstance(module, FusedDynamicLinear):
        yield "only linear layers round their input at run time; its weights are integers, its activations stay float"
    if config.block_size is not None and not isinstance(module, FusedBlockLinear):
        blocks = (
            f"its {module.in_features} inputs are no multiple of" if isinstance(module, nn.Linear) else "only linear layers have"
        )
        yield f"{blocks} block_size={config.block_size}; it has one scale a channel"
    if config.learn_scale and not isinstance(module, Fused):
        yield "scales are trained in convolutions, linear layers and embeddings; those of its weights follow the weights"
    if config.milestones is not None and not isinstance(module, Fused | QuantizedRecurrent):
        yield "its weights are rounded once, by finalize, and wait for no milestone"


def _mode(module: nn.Module) -> str:
    """The mode in which a module is quantized."""
    config = marked(module, WEIGHTS_LATER)[0] if marked(module, WEIGHTS_LATER) else module.config
    return config.mode if isinstance(config, Quantize) else ""


def settle_scales(model: nn.Module) -> None:
    """After tables were attached: decide which weights have one scale for the whole tensor because their values are shared."""
    for module in model.modules():
        unmark(module, SHARES)  # the trial call decided before there were tables
        if isinstance(module, Fused):
            settle(module, "weight")
        elif isinstance(module, QuantizedRecurrent):
            for param in module._flat_weights_names:
                settle(module, param)
        elif marked(module, WEIGHTS_LATER):
            for weight in weights_later(module):
                settle(module, weight.param)
