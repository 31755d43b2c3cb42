"""A smaller network out of a larger one: weights without the removed indices, and modules that know their new sizes.

Removing is torch-pruning's part: its pruners cut each layer and keep its sizes in step, ours extend them (`pruners.py`). Which
indices go is not taken from its dependency graph, but from identities (`trace.py`): the graph does not return on Swin and MaxViT,
takes 85 s on MC3-18 where identities take one, cannot follow a channel shuffle, and knows no heads.

Nothing of the forward code changes; the sizes that code of one's own remembers are renewed in `renew.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from torchopt.channels.groups import Axis, Group
from torchopt.channels.layers.pruners import prune_module
from torchopt.network.copies import copied

Removed = Mapping[Axis, np.ndarray]


def removed_indices(groups: Sequence[Group], gone: Sequence[np.ndarray]) -> dict[Axis, np.ndarray]:
    """Return for each axis the indices that go with the channels `gone` of the groups."""
    found: dict[Axis, list[np.ndarray]] = {}
    for group, chosen in zip(groups, gone, strict=True):
        for axis, indices in group.axes.items():
            found.setdefault(axis, []).append(indices[chosen].ravel())
    return {axis: np.unique(np.concatenate(parts)) for axis, parts in found.items() if any(map(len, parts))}


def cut(model: nn.Module, removed: Removed) -> nn.Module:
    """Return a copy of `model` without the removed indices.

    Args:
        model: it is not changed.
        removed: for each axis, the indices that go. The axes of a tied weight are named at its first place; "name." stands for the
            channels of a norm that has no tensors.
    """
    small = copied(model)
    places = _places(model)
    own: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for (first, dim), indices in removed.items():
        for name in places.get(first, [first]):
            owner, _, parameter = name.rpartition(".")
            own.setdefault(owner, {})[parameter, dim] = indices
    for name, module in small.named_modules():
        if name in own:
            prune_module(module, own[name])
            for buffer in {tensor for tensor, _ in own[name]} & {n for n, _ in module.named_buffers(recurse=False)}:
                module.register_buffer(
                    buffer, module.get_buffer(buffer)
                )  # persistent: a freshly built network would hold the wider one
    trained = dict(model.named_parameters())
    for first, names in places.items():
        tensor = _get(small, first)
        for name in names[1:]:
            owner, _, parameter = name.rpartition(".")
            setattr(small.get_submodule(owner), parameter, tensor)
        if first in trained:
            tensor.requires_grad_(trained[first].requires_grad)
            tensor.grad = None
    for module in small.modules():
        if "weight" not in module._parameters:
            _measure(module)
    return small


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Names of all places of each parameter and buffer, by the first; a tied weight has several."""
    by_tensor: dict[torch.Tensor, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        by_tensor.setdefault(tensor, []).append(name)
    return {names[0]: names for names in by_tensor.values()}


def _get(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), attribute)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _measure(module: nn.Module) -> None:
    """A layer whose weight is computed from others has been cut tensor by tensor, and knows its sizes by the result."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = _computed(module).shape
    elif isinstance(module, _ConvNd):
        rows, columns = _computed(module).shape[:2]
        if module.groups == module.in_channels > 1:  # depthwise: groups go with their channels
            module.groups = rows if module.transposed else rows * module.groups // module.out_channels
        first, second = rows, columns * module.groups
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)


def _computed(module: nn.Module) -> torch.Tensor:
    """The weight that is computed, or the widest tensor that a hook computes it from before each call."""
    if parametrize.is_parametrized(module, "weight"):
        return module.weight  # type: ignore[return-value]
    return max(module._parameters.values(), key=lambda p: 0 if p is None else p.dim() * 2**40 + p.numel())  # type: ignore[return-value]
