"""Where the grid of a weight ends: at a fraction c of the largest |w| of a channel, s = c·max|w| / Q.

With 8 bits c = 1 is as good as any. With 4 bits and fewer the step is wide, and clipping the few largest weights to make it finer
lowers the squared error of all:  c = argmin Σ (w − ŵ_c)²,  searched per channel.
"""

from __future__ import annotations

import torch

from torchopt.network.weights import Weight
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.weight_grid import along, weight_scale

FRACTIONS = torch.linspace(0.3, 1.0, 71, dtype=torch.float32)


@torch.no_grad()
def choose_reach(layer: Fused) -> None:
    """Set `layer.reach` to the fraction with the least squared rounding error, per channel."""
    assert layer.reach is not None
    layer.reach.fill_(1)
    w = layer.weight.detach()
    peak = layer.scale(w)
    rows = w.transpose(0, layer.out_axis).flatten(1)
    if peak.dim() == 0:
        rows, peak = rows.reshape(1, -1), peak.reshape(1)
    best = torch.full_like(peak, torch.inf)
    for fraction in FRACTIONS.tolist():
        scale = (peak * fraction)[:, None]
        error = ((rows / scale).round().clamp(-layer.qmax, layer.qmax) * scale - rows).square().sum(1)
        layer.reach[(error <= best).expand(len(layer.reach))] = fraction
        best = torch.minimum(error, best)


@torch.no_grad()
def hold(layer: Fused, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Write w ← s·q into the weight, and set the reach so that rounding it to nearest gives q and s again."""
    assert layer.reach is not None
    held = codes * along(scale, codes.dim(), layer.out_axis)
    Weight(module_name="", module=layer, param="weight", kind="custom", out_axis=layer.out_axis).trainable.copy_(held)
    peak = weight_scale(held, layer.qmax, None if scale.dim() == 0 else layer.out_axis)
    used = held.transpose(0, layer.out_axis).flatten(1).abs().amax(1) > 0
    layer.reach.copy_(torch.where(used, scale / peak, 1.0))
