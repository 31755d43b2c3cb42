"""A table of integers under a scale for each channel: which layers can have one, and how they take it.

    ŵ = s_channel · T[c]        T[c] an integer of the layer's grid, K of them in the tensor

Batch norm multiplies channels by factors of either sign when it is folded, and would turn K integers into 2K. So channels whose factor
is negative are turned first, weight and norm together: (−w)·(−γ), bit for bit the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchopt.network.surgery import batch_norm_affine
from torchopt.quantize.corrections.columns import LAYERS
from torchopt.quantize.corrections.reach import hold
from torchopt.quantize.layers.modules import LOW_BITS, Fused


def scales_channels(layer: nn.Module) -> int:
    """Return the largest integer of a layer that can have a table of integers under scales of its channels; 0 for others."""
    if not isinstance(layer, LAYERS) or layer.reach is None or layer.bits <= LOW_BITS or layer.config.learn_scale:
        return 0
    return layer.qmax if layer.config.per_channel and layer.config.block_size is None else 0


@torch.no_grad()
def channel_factors(layer: nn.Module, channels: int) -> torch.Tensor:
    """Return what batch norm multiplies each channel by, without its sign; 1 where none is fused in, or it multiplies by nothing."""
    if not isinstance(layer, Fused) or layer.bn is None:
        return torch.ones(channels)
    factor = batch_norm_affine(layer.bn)[0].detach().abs()  # type: ignore[arg-type]
    return torch.where(factor > 1e-6 * factor.max(), factor, 1e-6 * factor.max().clamp(min=1e-30))


@torch.no_grad()
def turn_channels(layer: nn.Module) -> torch.Tensor | None:
    """Turn the channels whose batch norm multiplies by a negative number, in place; return their signs (channels,), or None."""
    if not isinstance(layer, Fused) or layer.bn is None:
        return None
    bn: Any = layer.bn
    if bn.weight is None or bn.running_mean is None or not bool((bn.weight < 0).any()):
        return None
    signs = torch.where(bn.weight < 0, -1.0, 1.0)
    bn.weight.mul_(signs)
    bn.running_mean.mul_(signs)
    if layer.bias is not None:
        layer.bias.mul_(signs)
    return signs


@torch.no_grad()
def hold_integers(layer: nn.Module, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Let a layer's weight be s·q for given integers and scales (channels,), in place."""
    assert isinstance(layer, Fused)
    hold(layer, codes, scale)


@torch.no_grad()
def add_to_mean(layer: nn.Module, change: torch.Tensor | None = None) -> bool:
    """Add to the mean of each output channel before batch norm, (channels,), in place; False where nothing in the layer can."""
    mean = getattr(layer.bn, "running_mean", None) if isinstance(layer, Fused) and layer.bn is not None else None
    place = mean if mean is not None else getattr(layer, "bias", None)
    if not isinstance(place, torch.Tensor):
        return False
    if change is not None:
        place.add_(change.to(place), alpha=1 if mean is None else -1)
    return True
