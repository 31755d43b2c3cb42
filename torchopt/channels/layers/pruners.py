"""Removing indices from one module: torch-pruning's pruners, and its extension point for what it has none for.

A pruner (`torch_pruning.BasePruningFunc`) cuts the tensors of one kind of layer along its outputs or its inputs and keeps the layer's
sizes in step. torch-pruning has them for convolutions, depthwise convolutions, linear layers, norms, PReLU, embeddings and bare
parameters; those of torchopt are in `layer_pruners.py` and `sequence_pruners.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch_pruning import PrunerBox
from torch_pruning.ops import OPTYPE, module2type

from torchopt.channels.layers.attention import HeadAttention
from torchopt.channels.layers.layer_pruners import GroupNormPruner, InstanceNormPruner, LayerNormPruner, convolution_steps
from torchopt.channels.layers.sequence_pruners import attention_steps, recurrent_steps
from torchopt.channels.layers.slices import Own, Step, TensorPruner

KNOWN = (
    HeadAttention, nn.RNNBase, nn.RNNCellBase, _ConvNd, nn.Linear, nn.LayerNorm, nn.RMSNorm, _NormBase, nn.GroupNorm, nn.PReLU,
    nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip


@torch.no_grad()
def prune_module(module: nn.Module, own: Own) -> None:
    """Remove these indices of a module's own tensors, in place, and let it know its new sizes.

    Args:
        module: any module.
        own: for each axis of its tensors, the indices that go; the parameter "" stands for the channels of a norm without tensors.

    Example:
        >>> import numpy as np
        >>> layer = nn.Linear(4, 3)
        >>> prune_module(layer, {("weight", 0): np.array([1]), ("bias", 0): np.array([1])})
        >>> layer
        Linear(in_features=4, out_features=2, bias=True)
    """
    for pruner, side, indices in _steps(module, own):
        prune = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        prune(module, [int(i) for i in indices])


def _steps(module: nn.Module, own: Own) -> Iterator[Step]:
    computed = isinstance(module, nn.Linear | _ConvNd) and "weight" not in module._parameters  # by a parametrization, or a hook
    if isinstance(module, nn.Linear | _ConvNd) and not computed:  # what a class of one's own has added to them
        yield from ((TensorPruner(name, dim), "out", i) for (name, dim), i in own.items() if name not in ("weight", "bias"))
    if computed or parametrize.is_parametrized(module) or not isinstance(module, KNOWN):
        yield from ((TensorPruner(name, dim), "out", indices) for (name, dim), indices in own.items())
    elif isinstance(module, HeadAttention):
        yield from attention_steps(module, own)
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield from recurrent_steps(module, own)
    elif isinstance(module, _ConvNd):
        yield from convolution_steps(module, own)
    elif isinstance(module, nn.Linear):
        for dim, side in enumerate(("out", "in")):
            if ("weight", dim) in own:
                yield PrunerBox[OPTYPE.LINEAR], side, own["weight", dim]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield from ((LayerNormPruner(dim), "out", indices) for dim, indices in {dim: i for (_, dim), i in own.items()}.items())
    else:  # one axis of channels, which all tensors have
        special = {
            _InstanceNorm: InstanceNormPruner(),
            nn.GroupNorm: GroupNormPruner(),
            nn.EmbeddingBag: PrunerBox[OPTYPE.EMBED],
        }
        pruner = next((p for kind, p in special.items() if isinstance(module, kind)), PrunerBox.get(module2type(module)))
        yield pruner, "out", next(iter(own.values()))
