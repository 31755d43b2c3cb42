"""What a layer reads, as a matrix product on sampled positions, so that learning about its weight costs the same at any image size.

    y[g, p, o] = Σ_k  x[g, p, k] · w[g, o, k]        g group, p sampled position, o output channel of the group, k input weight

For a convolution x holds the patches under the kernel (im2col) at random positions of random samples, for a linear layer its rows.
A transposed convolution gives every tap of its kernel by itself: its rows are (channel, tap), and x holds what stands at one place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

PLACES = 8192  # sampled a layer


def readable(layer: nn.Module) -> bool:
    """True for the layers whose inputs this file can look at: convolutions and linear layers."""
    return isinstance(layer, nn.Linear | _ConvNd)


def moments(layer: nn.Module, inputs: Sequence[Tensor], count: int = PLACES, seed: int = 0) -> Tensor:
    """Return E[xᵀx] over about `count` sampled positions, float32 (groups, weights, weights).

    Args:
        layer: a convolution or a linear layer.
        inputs: what it reads, one tensor a call.
        count: how many positions.
        seed: of the choice.

    Example:
        >>> moments(nn.Linear(2, 1), [torch.tensor([[1.0, 2.0]])]).tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """
    return products(layer, inputs, inputs, count, seed)


def products(layer: nn.Module, left: Sequence[Tensor], right: Sequence[Tensor], count: int = PLACES, seed: int = 0) -> Tensor:
    """Return E[uᵀv] for two readings of the same calls, at the same positions; arguments as for `moments`."""
    total, seen = torch.zeros((), dtype=torch.float32, device=left[0].device), 0
    readings = [left] if left is right else [left, right]
    drawn = (sampled(layer, x, count, torch.Generator().manual_seed(seed)) for x in readings)
    for read in zip(*drawn, strict=True):
        x, *other = (by_group(layer, rows.float()) for rows, _ in read)
        total, seen = total + x.transpose(1, 2) @ (other[0] if other else x), seen + x.shape[1]
    return total / seen


def means(layer: nn.Module, inputs: Sequence[Tensor], count: int = PLACES, seed: int = 0) -> Tensor:
    """Return E[x] at the same positions, float32 (groups, weights); arguments as for `moments`.

    Example:
        >>> means(nn.Linear(2, 1), [torch.tensor([[1.0, 2.0], [3.0, 2.0]])]).tolist()
        [[2.0, 2.0]]
    """
    total, seen = torch.zeros((), dtype=torch.float32, device=inputs[0].device), 0
    for read, _ in sampled(layer, inputs, count, torch.Generator().manual_seed(seed)):
        total, seen = total + by_group(layer, read.float()).sum(1), seen + len(read)
    return total / seen


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as (groups, rows, weights that a row reads).

    Example:
        >>> as_rows(nn.ConvTranspose2d(4, 6, 3, groups=2), torch.zeros(4, 3, 3, 3)).shape
        torch.Size([2, 27, 2])
    """
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, _ConvTransposeNd):
        return weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)
    return weight.reshape(groups, len(weight) // groups, -1)


def from_rows(layer: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """Return what `as_rows` was given."""
    rows = rows.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else rows
    return rows.reshape(shape)


def by_group(layer: nn.Module, rows: Tensor) -> Tensor:
    """(positions, groups · n) as (groups, positions, n)."""
    return rows.reshape(len(rows), getattr(layer, "groups", 1), -1).transpose(0, 1).contiguous()


def sampled(layer: Any, inputs: Sequence[Tensor], count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each batch, what the layer reads at sampled positions (positions, groups · weights), and which they are."""
    share = -(-count // len(inputs))
    for x in inputs:
        if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
            rows = rows_of(layer, x)
            chosen = _choose(len(rows), share, generator)
            yield rows[chosen], chosen
        else:
            x = x if x.dim() == 2 + len(layer.kernel_size) else x[None]
            shape = torch.Size((len(x), *_sides(layer, x)))
            chosen = _choose(shape.numel(), share, generator)
            yield _patches(layer, x, torch.unravel_index(chosen, shape)), chosen  # type: ignore[arg-type]


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """One row a position, (samples · places, channels): a view where channels are last."""
    if isinstance(layer, _ConvNd):
        return x.movedim(-1 - len(layer.kernel_size), -1).flatten(0, -2)
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _sides(conv: Any, x: Tensor) -> list[int]:
    """The places of the output along each axis."""
    padding = conv._reversed_padding_repeated_twice[::-1]
    sizes = zip(x.shape[2:], padding[::2], padding[1::2], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return [(side + a + b - d * (k - 1) - 1) // s + 1 for side, a, b, k, s, d in sizes]


def _patches(conv: Any, x: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
    """Return what a convolution reads at output `positions` (samples, then places): (positions, channels · kernel)."""
    padding = conv._reversed_padding_repeated_twice  # last axis first
    if conv.padding_mode == "zeros":
        before = list(reversed(padding[::2]))
    else:
        x, before = F.pad(x, padding, mode=conv.padding_mode), [0] * (x.dim() - 2)
    rows, (sample, *place), sides = rows_of(conv, x), positions, x.shape[2:]
    patches = []
    for offset in itertools.product(*(range(k) for k in conv.kernel_size)):
        index, inside = sample, torch.ones_like(sample, dtype=torch.bool)
        for p, s, o, d, b, side in zip(place, conv.stride, offset, conv.dilation, before, sides, strict=True):
            at = p * s + o * d - b
            inside &= (at >= 0) & (at < side)
            index = index * side + at
        patches.append(rows[torch.where(inside, index, 0)] * inside[:, None])  # (positions, channels)
    return torch.stack(patches, 2).flatten(1)


def _choose(total: int, count: int, generator: torch.Generator) -> Tensor:
    if total <= count:
        return torch.arange(total)
    return torch.randint(total, (count,), generator=generator)
