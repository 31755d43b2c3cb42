"""Put a model on integer grids: for training, or for calibration alone; the prepared form is the same.

static        trace → fuse → place quantizers            weights and activations
dynamic       swap layers in place, no tracing            linear layers: weights, and activations on their range in each call
weight_only   swap layers in place, no tracing            weights alone, in any module
float16       weights rounded to half precision at the end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchopt.quantize.config import Quantize
from torchopt.quantize.in_place import in_place, twins
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.attention import open_attentions
from torchopt.quantize.milestones import begin
from torchopt.quantize.record import Record, record
from torchopt.quantize.static import static
from torchopt.quantize.targets import target_named


def attach(
    model: nn.Module,
    assignment: dict[str, Quantize],
    example_inputs: tuple[Any, ...] | None,
    *,
    target: str = "ort-x86",
    params: Mapping[str, Sequence[str]] | None = None,
) -> tuple[nn.Module, list[Record]]:
    """Return `model` with fake quantizers, and a record of each layer; it is changed in place where it is not traced.

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
    left: dict[str, str] = {}
    if on_graph:
        model, left = static(model, on_graph, example_inputs, runtime)
    there = dict(model.named_modules())
    dynamic = {path: config for path, config in assignment.items() if config.mode == "dynamic" and path in there}
    model, dynamic = open_attentions(model, dynamic)
    others = {path: config for path, config in assignment.items() if config.mode not in ("static", "dynamic") and path in there}
    untraced = dynamic | others
    for path, config in (twins(model, untraced) | untraced).items():
        model = in_place(model, path, config, runtime, (params or {}).get(path, ()))
    begin(model)
    for part in model.modules():
        if isinstance(part, ActivationQuantizer):  # made on the CPU; torch's operators want range and data on one device
            part.to(device)
    return model, record(model, assignment, left)
