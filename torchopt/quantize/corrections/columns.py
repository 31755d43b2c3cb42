"""A layer as a matrix product on sampled positions, so that learning about its weight costs the same at any image size.

    y[g, p, o] = Σ_k  x[g, p, k] · w[g, o, k]        g group, p sampled position, o output channel of the group, k input weight

For a convolution x holds the patches under the kernel (im2col) at random positions of random samples, for a linear layer its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from torchopt.quantize.layers import FusedConv1d, FusedConv2d, FusedConv3d, FusedLinear
from torchopt.quantize.modules import Fused

LAYERS = (FusedLinear, FusedConv1d, FusedConv2d, FusedConv3d)


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """Sampled inputs `x` (groups, positions, weights) and what they shall give, `y` (groups, positions, channels)."""

    x: torch.Tensor
    y: torch.Tensor


def columns(
    layer: Fused,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    count: int,
    seed: int,
    *,
    activated: bool = True,
) -> Columns:
    """Sample about `count` positions over all batches, in random order.

    Args:
        layer: a convolution or a linear layer.
        inputs: what the layer reads, one tensor a batch.
        outputs: what it shall give before its activation, likewise.
        count: how many positions.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    share = -(-count // len(inputs))
    parts = [_of_batch(layer, x, y, share, generator) for x, y in zip(inputs, outputs, strict=True)]
    x, y = (torch.cat(side) for side in zip(*parts, strict=True))
    order = torch.randperm(len(x), generator=generator)
    groups = getattr(layer, "groups", 1)
    y = y if layer.act is None else layer.act(y)
    return Columns(
        x=x[order].reshape(len(x), groups, -1).transpose(0, 1).contiguous(),
        y=y[order].reshape(len(y), groups, -1).transpose(0, 1).contiguous(),
    )


def _of_batch(
    layer: Fused, x: torch.Tensor, y: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (positions, all weights) and outputs (positions, channels)."""
    if isinstance(layer, FusedLinear):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        chosen = _choose(len(x), count, generator)
        return x[chosen], y[chosen]
    conv = cast(Any, layer)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    shape = (y.shape[0], *y.shape[2:])
    picked: Any = torch.unravel_index(_choose(torch.Size(shape).numel(), count, generator), shape)
    sample, *place = picked
    patches = []
    for offset in itertools.product(*(range(k) for k in conv.kernel_size)):
        at: list[Any] = [p * s + o * d for p, s, o, d in zip(place, conv.stride, offset, conv.dilation, strict=True)]
        patches.append(padded[(sample, slice(None), *at)])  # (positions, channels)
    return torch.stack(patches, 2).flatten(1), y[(sample, slice(None), *place)]


def _choose(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    if total <= count:
        return torch.arange(total)
    return torch.randint(total, (count,), generator=generator)
