"""Pruners for convolutions and norms that torch-pruning leaves out or cuts wrongly.

Depthwise convolutions with several outputs a channel; grouped transposed convolutions; instance norms with running statistics; group
norms in which each channel is a group; layer norms over several axes, and root-mean-square norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.nn.modules.conv import _ConvNd
from torch_pruning import PrunerBox
from torch_pruning.ops import OPTYPE

from torchopt.channels.layers.slices import Own, Pruner, Step, cut_tensor, gone_from

ConvPruner, GroupNorm, InstanceNorm = (type(PrunerBox[kind]) for kind in (OPTYPE.CONV, OPTYPE.GN, OPTYPE.IN))


def convolution_steps(module: _ConvNd, own: Own) -> Iterator[Step]:
    """Which pruner removes what from a convolution."""
    out, into = (1, 0) if module.transposed else (0, 1)
    width = module.weight.shape[1]
    if module.groups == module.in_channels == module.out_channels and module.groups > 1:
        yield PrunerBox[OPTYPE.DEPTHWISE_CONV], "out", own["weight", 0]
        return
    pruner = _GroupedConv() if module.groups > 1 else PrunerBox[OPTYPE.CONV]
    for dim, side in ((out, "out"), (into, "in")):
        gone = gone_from(own, "weight", dim)
        if len(gone):  # dimension 1 is that of one group, and torch-pruning counts over all
            yield pruner, side, gone if dim == 0 else (gone[None] + width * np.arange(module.groups)[:, None]).ravel()


class _GroupedConv(ConvPruner):  # type: ignore[misc, valid-type]
    """Several outputs for each depthwise channel; and transposed: weight (in, out / groups, …)."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        if layer.transposed:
            width = layer.weight.shape[1]
            cut_tensor(layer, "weight", 1, sorted({i % width for i in idxs}))
            cut_tensor(layer, "bias", 0, idxs)
            layer.out_channels -= len(idxs)
            return layer
        if layer.groups == layer.in_channels:  # groups go with their channels
            layer.in_channels = layer.groups = layer.groups - len(idxs) * layer.groups // layer.out_channels
        return super().prune_out_channels(layer, idxs)

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove inputs, in place."""
        if not layer.transposed:
            return super().prune_in_channels(layer, idxs)
        cut_tensor(layer, "weight", 0, idxs)
        layer.in_channels -= len(idxs)
        return layer


class InstanceNormPruner(InstanceNorm):  # type: ignore[misc, valid-type]
    """With running statistics."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        for name in ("running_mean", "running_var"):
            cut_tensor(layer, name, 0, idxs)
        return super().prune_out_channels(layer, idxs)


class GroupNormPruner(GroupNorm):  # type: ignore[misc, valid-type]
    """Where each channel is its own group, groups go with channels."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        if layer.num_groups == layer.num_channels:
            layer.num_groups -= len(idxs)
        return super().prune_out_channels(layer, idxs)


class LayerNormPruner(Pruner):
    """Any of the normalized axes; root-mean-square norms too."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        for name in ("weight", "bias"):
            cut_tensor(layer, name, self.pruning_dim, idxs)
        sizes = list(layer.normalized_shape)
        sizes[self.pruning_dim] -= len(idxs)
        layer.normalized_shape = tuple(sizes)
        return layer
