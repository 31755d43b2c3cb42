"""The optimizer steps at which training starts to round, freezes ranges, and freezes batch norms (`Quantize.milestones`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchopt.quantize.graph.naming import name_of_value
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.recurrent import QuantizedRecurrent

Part = Fused | ActivationQuantizer | QuantizedRecurrent  # what rounds in training


def begin(model: nn.Module) -> None:
    """Let every part wait for its own milestones, and pass those at step 0."""
    for part in _parts(model).values():
        if _of(part) is not None:
            part.enable_fake_quant(False)
    update(model, 0)


def update(model: nn.Module, step: int) -> bool:
    """After optimizer step `step`: pass the milestones that are due. True where something is quantized."""
    parts = _parts(model)
    for part in parts.values():
        milestones = _of(part)
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
    for name, part in _parts(model).items():
        if not part.rounding:
            begins = _of(part)
            when = f" before step {begins[0]} (Quantize.milestones)" if begins is not None and begins[0] > step else ""
            what = name_of_value(model, name) if isinstance(part, ActivationQuantizer) else name
            return f"{what} is not rounded{when}"
    return ""


def _parts(model: nn.Module) -> dict[str, Part]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Part)}


def _of(part: Part) -> Sequence[int] | None:
    return part.milestones if isinstance(part, ActivationQuantizer) else part.config.milestones
