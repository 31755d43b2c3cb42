"""A smaller network out of a larger one: weights without the removed indices, and modules that know their new sizes.

Removing is torch-pruning's part: its pruners cut each layer and keep its sizes in step, ours extend them (`pruners.py`). Which
indices go is not taken from its dependency graph, but from identities (`trace.py`): the graph does not return on Swin and MaxViT,
takes 85 s on MC3-18 where identities take one, cannot follow a channel shuffle, and knows no heads.

Nothing of the forward code changes. Code of one's own may remember sizes under names of its own, such as `num_heads` of an attention
block: where the network does not run without them, the usual names are tried too, and `check.py` decides.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from torchopt.prune.channels.attention import HeadAttention
from torchopt.prune.channels.groups import Axis, Group
from torchopt.prune.channels.pruners import prune_module

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_key_value_heads")
WIDTHS = (
    "all_head_size", "attention_head_size", "attn_dim", "channels", "d_model", "dim", "embed_dim", "head_dim", "hidden_dim", "hidden_size",
    "in_channels", "in_chs", "inner_dim", "nf", "num_features", "nx", "out_channels", "out_chs", "planes", "shape", "split_size",
    "unflattened_size", "width",
)  # fmt: skip
SIZED = (nn.Transformer, nn.Unflatten)  # of torch, and yet with sizes that no weight of their own tells
Size = int | tuple[int, ...]
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
    small = copy.deepcopy(model)
    places = _places(model)
    own: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for (first, dim), indices in removed.items():
        for name in places.get(first, [first]):
            owner, _, parameter = name.rpartition(".")
            own.setdefault(owner, {})[parameter, dim] = indices
    for name, module in small.named_modules():
        if name in own:
            prune_module(module, own[name])
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
        if parametrize.is_parametrized(module, "weight"):
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
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd):
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)


def rename(small: nn.Module, whole: nn.Module, groups: Sequence[Group], gone: Sequence[np.ndarray]) -> bool:
    """Give widths and numbers of heads that modules remember under one of the usual names their new values, in place.

    They are looked for in the smallest module that holds all weights of a group, and below it; a module that owns one of the weights
    may also remember the length of the whole axis, as that of queries, keys and values in one.

    Returns:
        True where any changed.
    """
    before, after = (dict([*model.named_parameters(), *model.named_buffers()]) for model in (whole, small))
    renewed: dict[tuple[nn.Module, str], Size] = {}
    pairs = sorted(zip(groups, gone, strict=True), key=lambda pair: len(_scope(pair[0])))  # the narrowest has the last word
    for group, chosen in pairs:
        old, new = len(group), int((~chosen).sum())
        for module in small.get_submodule(_scope(group)).modules():
            renewed |= _remembered(module, WIDTHS, old * group.unit, new * group.unit)
            renewed |= _remembered(module, HEADS, old, new) if group.unit > 1 else {}
        for name, dim in group.axes:
            shape = before[name].shape
            if shape.count(shape[dim]) == 1:  # else it cannot be told which of its axes a number is about
                owner = small.get_submodule(name.rpartition(".")[0])
                renewed |= _remembered(owner, WIDTHS, shape[dim], after[name].shape[dim])
    changed = {key: value for key, value in renewed.items() if key[0].__dict__[key[1]] != value}
    for (module, name), value in changed.items():
        setattr(module, name, value)
    return bool(changed)


def _remembered(module: nn.Module, names: Sequence[str], old: int, new: int) -> dict[tuple[nn.Module, str], Size]:
    """Which of these attributes of a module hold `old`, or a shape with it, and what they would hold instead."""
    if isinstance(module, HeadAttention) or (type(module).__module__.startswith("torch.nn.") and not isinstance(module, SIZED)):
        return {}  # their pruners know these
    found: dict[tuple[nn.Module, str], Size] = {}
    for name in names:
        value = module.__dict__.get(name)
        if type(value) is int and value == old:
            found[module, name] = new
        elif isinstance(value, tuple) and old in value:
            place = value.index(old)
            found[module, name] = (*value[:place], new, *value[place + 1 :])
    return found


def _scope(group: Group) -> str:
    """The dotted path of the smallest module that holds all weights of a group."""
    owners = zip(*(name.split(".")[:-1] for name, _ in group.axes), strict=False)
    return ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, owners))
