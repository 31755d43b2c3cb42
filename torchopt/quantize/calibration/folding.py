"""Fold each layer once: while calibration only runs the network, weights are computed once and not in each call.

In evaluation a quantized layer rounds its weight, or takes it from its mask and table, and folds batch norm into it in every forward
pass; calibration runs many passes over small pieces between which nothing changes. Its activation works in the layer's own result
meanwhile: memory for a second one is new at each call, and the operating system takes longer to map it than the pass takes to write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchopt.quantize.layers.modules import Fused


@contextmanager
def folded_once(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let the quantized ones among modules in evaluation mode compute on weights folded now, until the end.

    Example:
        >>> from torchopt.quantize.config import Quantize
        >>> from torchopt.quantize.layers.float_layers import FusedLinear
        >>> layer = FusedLinear.of(nn.Linear(1, 1, bias=False), Quantize(), 8).eval()
        >>> with folded_once([layer]):
        ...     held = layer.held
        >>> torch.equal(held[0], layer.weight), layer.held
        (True, None)
    """
    found = [m for m in layers if isinstance(m, Fused) and not m.training and m.bn_is_fixed]
    hooks = [layer.register_forward_pre_hook(_follow) for layer in found]
    try:
        with torch.no_grad():
            for layer in found:
                weight, bias = layer.in_use()
                layer.held = weight.detach(), bias
        _work_in_place(found, True)
        yield
    finally:
        _work_in_place(found, False)
        for layer, hook in zip(found, hooks, strict=True):
            layer.held = None
            hook.remove()


def _follow(layer: Fused, given: tuple[torch.Tensor, ...]) -> None:
    """Lay a convolution's weight out as its images are: one that is channels last would make the result so, which no `view` takes."""
    last = torch.channels_last
    if layer.held is not None and given[0].dim() == 4 and layer.held[0].dim() == 4:
        weight, bias = layer.held
        if given[0].is_contiguous(memory_format=last) and not given[0].is_contiguous():
            layer.held = weight.contiguous(memory_format=last), bias


def _work_in_place(layers: list[Fused], inplace: bool) -> None:
    """Activations that `fuse` made, each for its layer alone: nothing else reads what they overwrite."""
    for layer in layers:
        if isinstance(layer.act, nn.ReLU | nn.Hardtanh):
            layer.act.inplace = inplace
