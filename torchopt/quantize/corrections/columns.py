"""A layer as a matrix product on sampled positions: what it reads there (`solver.positions`), and what it shall give.

y[g, p, o] = Σ_k  x[g, p, k] · w[g, o, k]        g group, p sampled position, o output channel of the group, k input weight
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchopt.quantize.layers.float_layers import FusedConv1d, FusedConv2d, FusedConv3d, FusedLinear
from torchopt.quantize.layers.modules import Fused
from torchopt.solver.positions import by_group, rows_of, sampled

LAYERS = (FusedLinear, FusedConv1d, FusedConv2d, FusedConv3d)


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Sampled inputs `x` (groups, positions, weights) and what they shall give, `y` (groups, positions, channels)."""

    x: torch.Tensor
    y: torch.Tensor


def columns(layer: Fused, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], count: int, seed: int) -> Columns:
    """Sample about `count` positions over all batches, in random order.

    Args:
        layer: a convolution or a linear layer.
        inputs: what the layer reads, one tensor a batch.
        outputs: what it shall give before its activation, likewise.
        count: how many positions.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = list(sampled(layer, inputs, count, generator))
    x = torch.cat([read for read, _ in parts])
    y = torch.cat([rows_of(layer, given)[chosen] for given, (_, chosen) in zip(outputs, parts, strict=True)])
    order = torch.randperm(len(x), generator=generator)
    y = y if layer.act is None else layer.act(y)
    return Columns(x=by_group(layer, x[order]), y=by_group(layer, y[order]))
