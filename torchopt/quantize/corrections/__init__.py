"""Corrections after training: what rounding does to a trained network, and how calibration data takes it back.

    equalize          channels of a tensor between two layers get equal ranges            equalize.py
    reach             with 4 bits and fewer, the grid of a channel ends below its largest weight   reach.py
    adaptive          each weight learns whether it rounds down or up                       adaptive.py
    bias_correction   each channel keeps its mean                                           bias.py

The first two come before the ranges of activations are observed, the others after, layer by layer on a walk through the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchopt.batches import Batch, model_inputs
from torchopt.errors import ModelError
from torchopt.progress import track
from torchopt.quantize.corrections.adaptive import round_adaptively
from torchopt.quantize.corrections.bias import correct_bias
from torchopt.quantize.corrections.columns import LAYERS
from torchopt.quantize.corrections.equalize import equalize
from torchopt.quantize.corrections.reach import choose_reach
from torchopt.quantize.corrections.walk import SAMPLES, Call, kept, rounding, walk
from torchopt.quantize.modules import Fused


def check(model: nn.Module) -> None:
    """When quantizers are attached: refuse what corrections cannot correct.

    Raises:
        ModelError: adaptive rounding is asked for a layer of a kind that it does not know.
    """
    for name, layer in _layers(model):
        if layer.config.rounding == "adaptive" and not isinstance(layer, LAYERS):
            kind = type(layer).__name__.removeprefix("Fused")
            raise ModelError(
                f"quantize: {name} is a {kind}, adaptive rounding knows convolutions and linear layers; "
                "give it a rule with rounding='nearest'"
            )


def ahead(model: nn.Module, batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[Call]]:
    """Before activations are observed: equalize, choose where low-bit grids end, and keep samples for what comes after.

    Returns:
        All the batches again, and the kept samples (none where no correction needs them).

    Raises:
        ModelError: a correction meets a weight that a table of shared values holds.
    """
    _refuse_tables(model)
    calls: list[Call] = []
    if any(_learns(layer) for _, layer in _layers(model)):
        batches, calls = _taken(model, batches)
    if calls and any(layer.config.equalize for _, layer in _layers(model)):
        equalize(model, calls)
    for _, layer in _layers(model):
        if layer.shift is not None:
            layer.shift.zero_()
        if layer.reach is not None:
            choose_reach(layer)
    return batches, calls


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While activations are observed: weights that will be rounded adaptively are not rounded to nearest."""
    layers = [layer for _, layer in _layers(model) if layer.config.rounding == "adaptive"]
    before = [layer.rounding for layer in layers]
    for layer in layers:
        layer.rounding = False
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.rounding = was


@torch.no_grad()
def correct(model: nn.Module, calls: Sequence[Call], *, progress: bool = False) -> None:
    """After the ranges are set: learn the rounding of weights, then move biases, layer by layer, in place."""
    wanted = sum(layer.config.rounding == "adaptive" or layer.config.bias_correction for _, layer in _layers(model))
    if not calls or not wanted:
        return
    with rounding(model):
        for visit in track(walk(model, calls), "correct", enabled=progress):
            if visit.layer.config.rounding == "adaptive":
                round_adaptively(visit)
            if visit.layer.config.bias_correction:
                correct_bias(visit)


def _layers(model: nn.Module) -> list[tuple[str, Fused]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]


def _learns(layer: Fused) -> bool:
    return layer.config.equalize or layer.config.bias_correction or layer.config.rounding == "adaptive"


def _taken(model: nn.Module, batches: Iterable[Batch]) -> tuple[Iterable[Batch], list[Call]]:
    """Read as many batches as hold `SAMPLES` samples; iterators are put together again."""
    stream, seen = iter(batches), []

    def read() -> Iterator[Call]:
        for batch in stream:
            seen.append(batch)
            yield model_inputs(model, batch)

    calls = kept(read(), SAMPLES)
    return itertools.chain(seen, stream), calls


def _holds_table(layer: Fused) -> bool:
    return any(parametrize.is_parametrized(layer, name) for name in ("weight", "weight_orig"))


def _refuse_tables(model: nn.Module) -> None:
    for name, layer in _layers(model):
        asked = "rounding='adaptive'" if layer.config.rounding == "adaptive" else "equalize" if layer.config.equalize else None
        if asked is not None and _holds_table(layer):
            raise ModelError(
                f"calibrate: {name}.weight holds shared values, which {asked} would pull apart; leave one of the two out of its rule"
            )
