"""A layer as a matrix product on sampled positions, so that learning about its weight costs the same at any image size.

    y[g, p, o] = Σ_k  x[g, p, k] · w[g, o, k]        g group, p sampled position, o output channel of the group, k input weight

For a convolution x holds the patches under the kernel (im2col) at random positions of random samples, for a linear layer its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from torchopt.quantize.layers.float_layers import FusedConv1d, FusedConv2d, FusedConv3d, FusedLinear
from torchopt.quantize.layers.modules import Fused

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
    parts = list(_sampled(layer, inputs, count, generator))
    x = torch.cat([read for read, _ in parts])
    y = torch.cat([_rows(layer, given)[chosen] for given, (_, chosen) in zip(outputs, parts, strict=True)])
    order = torch.randperm(len(x), generator=generator)
    y = y if layer.act is None else layer.act(y)
    return Columns(x=_by_group(layer, x[order]), y=_by_group(layer, y[order]))


def gram(layer: Fused, inputs: Sequence[torch.Tensor], count: int, seed: int) -> torch.Tensor:
    """Return E[xᵀx] over about `count` sampled positions, float32 (groups, weights, weights); arguments as for `columns`."""
    total, seen = torch.zeros((), dtype=torch.float32, device=layer.weight.device), 0
    for read, _ in _sampled(layer, inputs, count, torch.Generator().manual_seed(seed)):
        x = _by_group(layer, read)
        total, seen = total + x.transpose(1, 2) @ x, seen + x.shape[1]
    return total / seen


def _by_group(layer: Fused, rows: torch.Tensor) -> torch.Tensor:
    """(positions, groups · n) as (groups, positions, n)."""
    return rows.reshape(len(rows), getattr(layer, "groups", 1), -1).transpose(0, 1).contiguous()


def _sampled(
    layer: Fused, inputs: Sequence[torch.Tensor], count: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, for each batch, what the layer reads at sampled positions (positions, groups · weights), and which they are."""
    share = -(-count // len(inputs))
    for x in inputs:
        if isinstance(layer, FusedLinear):
            rows = _rows(layer, x)
            chosen = _choose(len(rows), share, generator)
            yield rows[chosen], chosen
        else:
            shape = torch.Size((len(x), *_sides(cast(Any, layer), x)))
            chosen = _choose(shape.numel(), share, generator)
            yield _patches(cast(Any, layer), x, torch.unravel_index(chosen, shape)), chosen  # type: ignore[arg-type]


def _sides(conv: Any, x: torch.Tensor) -> list[int]:
    """The places of the output along each axis."""
    padding = conv._reversed_padding_repeated_twice[::-1]
    sizes = zip(x.shape[2:], padding[::2], padding[1::2], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return [(side + a + b - d * (k - 1) - 1) // s + 1 for side, a, b, k, s, d in sizes]


def _patches(conv: Any, x: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return what a convolution reads at output `positions` (samples, then places): (positions, channels · kernel)."""
    padding = conv._reversed_padding_repeated_twice  # last axis first
    if conv.padding_mode == "zeros":
        before = list(reversed(padding[::2]))
    else:
        x, before = F.pad(x, padding, mode=conv.padding_mode), [0] * (x.dim() - 2)
    rows, (sample, *place), sides = _rows(conv, x), positions, x.shape[2:]
    patches = []
    for offset in itertools.product(*(range(k) for k in conv.kernel_size)):
        index, inside = sample, torch.ones_like(sample, dtype=torch.bool)
        for p, s, o, d, b, side in zip(place, conv.stride, offset, conv.dilation, before, sides, strict=True):
            at = p * s + o * d - b
            inside &= (at >= 0) & (at < side)
            index = index * side + at
        patches.append(rows[torch.where(inside, index, 0)] * inside[:, None])  # (positions, channels)
    return torch.stack(patches, 2).flatten(1)


def _rows(layer: Fused, x: torch.Tensor) -> torch.Tensor:
    """One row a position, (samples · places, channels): a view where channels are last."""
    return x.movedim(layer.channel_axis, -1).flatten(0, -2)


def _choose(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    if total <= count:
        return torch.arange(total)
    return torch.randint(total, (count,), generator=generator)
