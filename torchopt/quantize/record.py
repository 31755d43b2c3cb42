"""What each layer was given by quantization: one record a layer, made by `attach` from what stands in the model, and kept in its state.

How fine the scale of a weight is depends on tables, which are attached later. It is decided once they stand, here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from torchopt.network.weights import IN_PROJECTION, Skipped
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.bare_weights import Later, later, weights_later
from torchopt.quantize.layers.blocks import FusedBlockLinear
from torchopt.quantize.layers.dynamic import FusedDynamicLinear
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.recurrent import QuantizedRecurrent
from torchopt.quantize.layers.weight_grid import SHARES, decide, take_over
from torchopt.state.marks import marked, unmark

NO_LAYER = "the traced graph does not call it as a layer of a known class; it stays float (mode='weight_only' reaches it)"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one layer was given.

    Attributes:
        path: the module that a rule names.
        mode: how it is rounded: the mode of its rule, or a lesser one; "" where it stays float.
        bits: of its weights; None where it stays float.
        milestones: the steps at which it starts to round, and what goes with it; None where it rounds from the start, or at the end.
        why_float: why it stays float; None where it does not.
        lacks: what it has less than its rule asks for, though its weights are rounded.
    """

    path: str
    mode: str
    bits: int | None = None
    milestones: tuple[int, ...] | None = None
    why_float: str | None = None
    lacks: tuple[str, ...] = ()

    @property
    def skipped(self) -> list[Skipped]:
        """What reports say of it: nothing where it has all that was asked for."""
        reason = self.why_float or "; ".join(self.lacks)
        return [Skipped(name=self.path, technique="quantize", reason=reason)] if reason else []


def record(model: nn.Module, assignment: Mapping[str, Quantize], left: Mapping[str, str]) -> list[Record]:
    """Return a record of each assigned module, from what stands in its place.

    Args:
        model: with fake quantizers.
        assignment: what was asked for, by path.
        left: why modules were left float, by path, where tracing or a measurement has said so.
    """
    modules = dict(model.named_modules())
    there = {path: f"{path}.{IN_PROJECTION}" if f"{path}.{IN_PROJECTION}" in modules else path for path in assignment}
    return [_record(path, modules.get(there[path]), config, left.get(there[path])) for path, config in assignment.items()]


def _record(path: str, module: nn.Module | None, asked: Quantize, reason: str | None) -> Record:
    given: Fused | QuantizedRecurrent | Later | None = None
    if module is not None:
        given = module if isinstance(module, Fused | QuantizedRecurrent) else later(module)
    if module is None or given is None or reason:
        return Record(path=path, mode="", why_float=reason if reason and module is not None else NO_LAYER)
    waits = None if isinstance(given, Later) or given.config.milestones is None else tuple(given.config.milestones)
    mode = given.config.mode
    if mode == "dynamic" and not isinstance(module, FusedDynamicLinear):
        mode = "weight_only"
    lacks = tuple(_lacks(module, asked, mode))
    return Record(path=path, mode=mode, bits=16 if mode == "float16" else given.bits, milestones=waits, lacks=lacks)


def _lacks(module: nn.Module, asked: Quantize, mode: str) -> Iterator[str]:
    """What is missing in a module whose weights are integers."""
    if asked.mode == "static" and mode == "weight_only":
        yield "the graph shows no layer of a known class; its weights are integers, its activations stay float, as with mode='weight_only'"
    if asked.mode == "dynamic" and mode == "weight_only":
        yield "only linear layers round their input at run time; its weights are integers, its activations stay float"
    if asked.block_size is not None and not isinstance(module, FusedBlockLinear):
        blocks = (
            f"its {module.in_features} inputs are no multiple of" if isinstance(module, nn.Linear) else "only linear layers have"
        )
        yield f"{blocks} block_size={asked.block_size}; it has one scale a channel"
    if asked.learn_scale and not isinstance(module, Fused):
        yield "scales are trained in convolutions, linear layers and embeddings; those of its weights follow the weights"
    if asked.milestones is not None and not isinstance(module, Fused | QuantizedRecurrent):
        yield "its weights are rounded once, by finalize, and wait for no milestone"


def decide_scales(model: nn.Module) -> None:
    """Where tables stand as they will: decide which weights have one scale for the whole tensor because their values are shared."""
    for module in model.modules():
        unmark(module, SHARES)
        for param in _rounded(module):
            decide(module, param)


def decisions(model: nn.Module) -> dict[str, dict[str, bool]]:
    """What was decided for weights of modules without a quantized layer, by path and name: no buffer of theirs holds it."""
    return {path: known for path, m in model.named_modules() if later(m) is not None and (known := marked(m, SHARES))}


def decide_as(model: nn.Module, saved: Mapping[str, Mapping[str, bool]]) -> None:
    """Take such decisions over, in place; those of weights that are not there say nothing."""
    modules = dict(model.named_modules())
    for path, known in saved.items():
        if path in modules and later(modules[path]) is not None:
            take_over(modules[path], known)


def _rounded(module: nn.Module) -> list[str]:
    """The names of the weights of one module that have a scale of the module's own."""
    if isinstance(module, Fused):
        return list(module.rounded_params)
    if isinstance(module, QuantizedRecurrent):
        return module.rounded_params
    return [] if later(module) is None else [weight.param for weight in weights_later(module)]
