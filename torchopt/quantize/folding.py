"""Fold each layer once: while calibration only runs the network, weights are computed once and not in each call.

In evaluation a quantized layer rounds its weight, or takes it from its mask and table, and folds batch norm into it in every forward
pass; calibration runs many passes over small pieces between which nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchopt.quantize.modules import Fused


@contextmanager
def folded_once(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let the quantized ones among modules in evaluation mode compute on weights folded now, until the end.

    Example:
        >>> from torchopt.quantize.config import Quantize
        >>> from torchopt.quantize.layers import FusedLinear
        >>> layer = FusedLinear.of(nn.Linear(1, 1, bias=False), Quantize(), 8).eval()
        >>> with folded_once([layer]):
        ...     held = layer.held
        >>> torch.equal(held[0], layer.weight), layer.held
        (True, None)
    """
    found = [m for m in layers if isinstance(m, Fused) and not m.training and m.bn_is_fixed]
    try:
        with torch.no_grad():
            for layer in found:
                layer.held = _laid(*layer.in_use())
        yield
    finally:
        for layer in found:
            layer.held = None


def _laid(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight in the order of memory that convolutions on channels-last inputs take."""
    weight = weight.detach()
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight, bias
