"""Masked weights set to zero in place, at little more than the time that it takes to read and write them.

    bits(w) ← m · bits(w)        m = 0 or 1, so the bits stay, or become those of +0.0

Torch multiplies float32 by bytes after turning all the bytes into floats, in new memory of the weight's size. Here blocks that stay in
the second-level cache are widened to integers of the weight's width, in memory that is kept, and the bits are multiplied: five times
as fast (3 ms instead of 15 for the 11 M weights of ResNet-18, two threads), without a product or an allocation of the model's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.fast.buffers import scratch

BLOCK = 1 << 18  # weights: 1 MB of integers, half of what two cores' second-level caches hold; many times torch's grain of 32,768
WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes a weight


@torch.no_grad()
def zero_(weight: Tensor, mask: Tensor) -> Tensor:
    """Set the elements of `weight` to +0.0 where `mask` is False, in place.

    Args:
        weight: floating, any shape and layout.
        mask: bool, of the same shape.

    Returns:
        `weight`.

    Example:
        >>> zero_(torch.tensor([1.0, -2.0, float("nan")]), torch.tensor([True, False, False])).tolist()
        [1.0, 0.0, 0.0]
    """
    lines = _lines(weight, mask)
    if lines is None:
        return weight.masked_fill_(~mask, 0.0)
    bits, keep = lines
    memory = scratch(min(BLOCK, len(bits)), dtype=bits.dtype)
    for start in range(0, len(bits), BLOCK):
        part = bits[start : start + BLOCK]
        part.mul_(memory[: len(part)].copy_(keep[start : start + BLOCK]))
    return weight


def _lines(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """The bits of the weights and the mask's bytes, both (n,) in the order of memory; None where that is not one line on the CPU."""
    layouts = [torch.contiguous_format, *([torch.channels_last] if weight.dim() == 4 else [])]
    alike = any(weight.is_contiguous(memory_format=f) and mask.is_contiguous(memory_format=f) for f in layouts)
    if weight.device.type != "cpu" or weight.element_size() not in WIDE or not alike:
        return None
    bits, keep = (t.detach().as_strided((t.numel(),), (1,)) for t in (weight, mask))
    return bits.view(WIDE[weight.element_size()]), keep.view(torch.int8)
