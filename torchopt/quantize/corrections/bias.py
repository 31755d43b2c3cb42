"""Bias correction: take back the shift of each channel that rounding causes (Nagel et al. 2019, arXiv:1906.04721, §4.2).

    b̂ ← b̂ + E[ψ(f(y) − f(ŷ))] / P(f passes y or ŷ)     y float, ŷ rounded, after batch norm and before the activation f
                                                        ψ(e) = clamp(e, −3m, 3m),  m = E|ψ(e)| where f passes

Rounding errors of a weight do not average out over an input whose mean is not zero (and after a ReLU none is), so that channels drift
and the drift adds up over layers. The expectation is taken over calibration data, layer by layer in the order of the graph: each layer
sees what the layers before it, rounded and corrected already, give. It is the mean after the activation that is kept: an error where
that is flat changes nothing, and a mean over only those y that pass would take noise for a shift where few do (a channel that is
nearly always below zero).

The mean is Huber's (1964), which large errors enter with a bounded weight. Ranges clip the rare values that the network hardly reads,
and the errors there are a hundred times the others: in MobileNetV2 one place in a hundred makes up the whole plain mean, which moved
all the others to repay what nobody reads, and cost 3 dB at the outputs where nothing else was rounded coarsely.
The shift is kept apart from the bias (`Fused.shift`), so that calibration can be repeated; `bake` adds the two.
"""

from __future__ import annotations

import torch
from torch import nn

from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.corrections.walk import Visit

MOST = 1 << 15  # positions that a layer's means are taken over
ROUNDS = 5  # each takes away most of what the activation's bend and the errors beyond the limit left
CACHED = 1 << 16  # numbers that are worked on at a time: all steps of a round find them in the processor's cache
LIMIT = 3.0  # times the mean |error| of a channel


@torch.no_grad()
def correct_bias(visit: Visit) -> None:
    """Set the shift of one layer so that each channel's mean is the float network's, in place."""
    assert visit.layer.shift is not None
    visit.layer.set_shift(torch.zeros_like(visit.layer.shift))
    visit.layer.set_shift(mean_shift(visit))


@torch.no_grad()
def mean_shift(visit: Visit) -> torch.Tensor:
    """Return what to add to each output channel before the activation f so that Huber's E[f(y)] is kept: float32, (channels,)."""
    layer = visit.layer
    act, layer.act = layer.act, None
    every = (
        max(1, sum(y.numel() for y in visit.floats) // (visit.floats[0].shape[layer.channel_axis] * MOST)) | 1
    )  # odd, so that it does not follow rows
    with folded_once([layer]):
        before = torch.cat([_rows(layer(x), layer.channel_axis, every) for x in visit.inputs])
    layer.act = act
    wanted = torch.cat([_rows(y, layer.channel_axis, every) for y in visit.floats])
    size = max(1, CACHED // before.shape[1])
    parts = [(b, w, w if act is None else act(w.clone())) for b, w in zip(before.split(size), wanted.split(size), strict=True)]
    shift = torch.zeros(before.shape[1], dtype=torch.float32, device=before.device)
    most = torch.full_like(shift, torch.inf)
    for _ in range(ROUNDS):
        error, size_of_error, count = torch.stack([_sums(*part, shift, most, act) for part in parts]).sum(0)
        shift += error / count.clamp(min=1)
        most = LIMIT * size_of_error / count.clamp(min=1)
    return shift


def _sums(
    before: torch.Tensor, wanted: torch.Tensor, kept: torch.Tensor, shift: torch.Tensor, most: torch.Tensor, act: nn.Module | None
) -> torch.Tensor:
    """Over some positions: the errors within the limit, their sizes where f passes, and how many of those there are, (3, channels)."""
    moved = before + shift
    given = moved if act is None else act(moved.clone())
    error = torch.clamp(kept - given, -most, most)
    if act is None:
        return torch.stack([error.sum(0), error.abs().sum(0), torch.full_like(shift, float(len(error)))])
    passes = (kept == wanted).logical_or_(given == moved).to(error.dtype)
    return torch.stack([error.sum(0), error.abs_().mul_(passes).sum(0), passes.sum(0)])


def _rows(y: torch.Tensor, axis: int, every: int) -> torch.Tensor:
    """Every so many positions of a result: (positions, channels)."""
    return y.movedim(axis, -1).flatten(0, -2)[::every]
