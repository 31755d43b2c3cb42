"""Inputs for proofs made from the ones that a user gives: more samples than one, and noise in the place of constants."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from torchopt.network.proof import Call

SEVERAL = 4  # samples in training mode


def several(call: Call) -> Call:
    """Return a call of four samples for one of one, noise of its size beside it: in training mode batch norm wants samples that differ.

    Example:
        >>> [len(x) for x in several(((torch.rand(1, 8), torch.rand(5, 8)), {}))[0]]
        [4, 5]
    """
    generator = torch.Generator().manual_seed(2)

    def others(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dim() or len(x) != 1:
            return x
        if not x.is_floating_point():
            return torch.cat([x.roll(i, -1) if x.dim() > 1 else x for i in range(SEVERAL)])
        noise = torch.randn((SEVERAL - 1, *x.shape[1:]), generator=generator).to(x)
        return torch.cat([x, noise * (x.std() if x.numel() > 1 else 1.0) + x.mean()])

    return tree_map(others, call)  # type: ignore[no-any-return]


def in_noise(call: Call) -> Call:
    """Return a call whose constant tensors (an example of zeros, which says little) are noise instead."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.numel() < 2 or not bool((x == x.flatten()[0]).all()):
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)

    return tree_map(noise, call)  # type: ignore[no-any-return]
