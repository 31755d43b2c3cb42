"""Bias correction: take back the shift of each channel's mean that rounding causes (Nagel et al. 2019, arXiv:1906.04721, §4.2).

    b̂ ← b̂ + E[f(y) − f(ŷ)] / P(f passes y or ŷ)        y float, ŷ rounded, after batch norm and before the activation f

Rounding errors of a weight do not average out over an input whose mean is not zero (and after a ReLU none is), so that channels drift
and the drift adds up over layers. The expectation is taken over calibration data, layer by layer in the order of the graph: each layer
sees what the layers before it, rounded and corrected already, give. It is the mean after the activation that is kept: an error where
that is flat changes nothing, and a mean over only those y that pass would take noise for a shift where few do (a channel that is
nearly always below zero). The shift is kept apart from the bias (`Fused.shift`), so that calibration can be repeated; `bake` adds the two.
"""

from __future__ import annotations

import torch

from torchopt.quantize.corrections.walk import Visit
from torchopt.quantize.folding import folded_once
from torchopt.quantize.weight_grid import along

ROUNDS = 4  # each takes away most of what the activation's bend left


@torch.no_grad()
def correct_bias(visit: Visit) -> None:
    """Set the shift of one layer so that each channel's mean is the float network's, in place."""
    assert visit.layer.shift is not None
    visit.layer.shift.zero_()
    visit.layer.shift.copy_(mean_shift(visit))


@torch.no_grad()
def mean_shift(visit: Visit) -> torch.Tensor:
    """Return what to add to each output channel before the activation f so that E[f(y)] is kept: float32, (channels,)."""
    layer = visit.layer
    act, layer.act = layer.act, None
    with folded_once([layer]):
        rounded = [layer(x) for x in visit.inputs]
    layer.act = act
    shift = torch.zeros(rounded[0].shape[layer.channel_axis], device=layer.weight.device)
    for _ in range(1 if act is None else ROUNDS):
        total, count = torch.zeros_like(shift), torch.zeros_like(shift)
        for y, before in zip(visit.floats, rounded, strict=True):
            moved = before + along(shift, before.dim(), layer.channel_axis)
            after, moved_after = (y, moved) if act is None else (act(y), act(moved))
            total += _by_channel(after - moved_after, layer.channel_axis)
            count += _by_channel(((after == y) | (moved_after == moved)).float(), layer.channel_axis)
        shift += total / count.clamp(min=1)
    return shift


def _by_channel(y: torch.Tensor, axis: int) -> torch.Tensor:
    return y.movedim(axis, -1).flatten(0, -2).sum(0)
