"""Corrections after training: what rounding does to a trained network, and how calibration data takes it back.

    equalize          channels of a tensor between two layers get equal ranges            equalize.py
    reach             with 4 bits and fewer, the grid of a channel ends below its largest weight   reach.py
    least_squares     each rounding error is taken up by the weights after it               least_squares.py
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

from torchopt.errors import ModelError
from torchopt.io.progress import track
from torchopt.quantize.calibration.batch_slices import Call, kept
from torchopt.quantize.corrections.adaptive import round_adaptively
from torchopt.quantize.corrections.bias import correct_bias
from torchopt.quantize.corrections.columns import LAYERS
from torchopt.quantize.corrections.equalize import equalize
from torchopt.quantize.corrections.least_squares import round_by_least_squares
from torchopt.quantize.corrections.reach import choose_reach
from torchopt.quantize.corrections.walk import holds_table, rounding, walk
from torchopt.quantize.layers.blocks import FusedBlockLinear
from torchopt.quantize.layers.modules import LOW_BITS, Fused

SAMPLES = 128  # what corrections learn from; more samples cost memory and change the third digit
ROUND = {"least_squares": round_by_least_squares, "adaptive": round_adaptively}


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


def ahead(model: nn.Module, calls: Iterable[list[Call]]) -> tuple[Iterable[list[Call]], list[Call]]:
    """Before activations are observed: equalize, choose where low-bit grids end, and keep samples for what comes after.

    Args:
        model: what `attach` returned.
        calls: each as the pieces that together are it.

    Returns:
        All the calls again, and the kept samples (none where no correction needs them).

    Raises:
        ModelError: a correction meets a weight that a table of shared values holds.
    """
    _refuse_tables(model)
    samples: list[Call] = []
    if any(_learns(layer) for _, layer in _layers(model)):
        calls, samples = _taken(calls)
    if samples and any(layer.config.equalize for _, layer in _layers(model)):
        equalize(model, samples)
    for _, layer in _layers(model):
        if layer.shift is not None:
            layer.set_shift(torch.zeros_like(layer.shift))
        if isinstance(layer, FusedBlockLinear):
            continue  # its scales have their own places
        if layer.reach is not None and (layer.bits <= LOW_BITS or _rounds(layer)):
            choose_reach(layer)
    return calls, samples


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While activations are observed: weights that will be rounded otherwise are not rounded to nearest."""
    layers = [layer for _, layer in _layers(model) if _rounds(layer)]
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
    wanted = sum(_rounds(layer) or layer.config.corrects_bias for _, layer in _layers(model))
    if not calls or not wanted:
        return
    compares = any(layer.config.corrects_bias or layer.config.rounding == "adaptive" for _, layer in _layers(model))
    with rounding(model):
        for visit in track(walk(model, calls, floats=compares), "correct", enabled=progress):
            if _rounds(visit.layer):
                ROUND[visit.layer.config.rounding](visit)
            if visit.layer.config.corrects_bias:
                correct_bias(visit)


def _layers(model: nn.Module) -> list[tuple[str, Fused]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]


def _learns(layer: Fused) -> bool:
    config = layer.config
    return config.equalize or config.corrects_bias or config.rounding != "nearest" or config.observer == "auto"


def _rounds(layer: Fused) -> bool:
    """True where calibration writes rounded weights: not under a table, not on a learned scale, not in layers of other kinds."""
    free = not holds_table(layer) and not layer.config.learn_scale and isinstance(layer, LAYERS)
    return free and layer.config.rounding in ROUND


def _taken(calls: Iterable[list[Call]]) -> tuple[Iterable[list[Call]], list[Call]]:
    """Read as many calls as hold `SAMPLES` samples; iterators are put together again."""
    stream, seen = iter(calls), []

    def read() -> Iterator[Call]:
        for pieces in stream:
            seen.append(pieces)
            yield from pieces

    samples = kept(read(), SAMPLES)
    return itertools.chain(seen, stream), samples


def _refuse_tables(model: nn.Module) -> None:
    for name, layer in _layers(model):
        if layer.config.rounding == "adaptive" and holds_table(layer):
            raise ModelError(
                f"calibrate: {name}.weight holds shared values, which rounding='adaptive' would pull apart; leave one of the two out of "
                "its rule"
            )
