"""A smaller network out of a larger one: weights without the removed indices, and modules that know their new sizes.

Nothing of the forward code changes. What a module remembers of its sizes is read off its weights again (`out_channels`, `groups`,
`normalized_shape`, …). Code of one's own may remember sizes under names of its own, such as `num_heads` of an attention block:
where the network does not run without them, the usual names are tried too, and `check.py` decides.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from torchopt.prune.channels.attention import HeadAttention
from torchopt.prune.channels.groups import Axis, Group

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


def cut(model: nn.Module, removed: Removed, bare: Mapping[str, Sequence[int | None]]) -> nn.Module:
    """Return a copy of `model` without the removed indices.

    Args:
        model: it is not changed.
        removed: for each axis, the indices that go; the axes of a tied weight are named at its first place.
        bare: the new sizes of norm modules that have no tensors to read them off; None where a size stays.
    """
    small = copy.deepcopy(model)
    tensors = dict([*small.named_parameters(), *small.named_buffers()])
    slices: dict[torch.Tensor, list[tuple[int, np.ndarray]]] = {}
    for (name, dim), indices in removed.items():
        slices.setdefault(tensors[name], []).append((dim, indices))
    new = {tensor: _without(tensor, parts) for tensor, parts in slices.items()}
    for module in small.modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor in new:
                setattr(module, attribute, new[tensor])
    for name, module in small.named_modules():
        refit(module, model.get_submodule(name), bare.get(name, ()))
    for parameter in small.parameters():
        parameter.grad = None
    return small


@torch.no_grad()
def _without(tensor: torch.Tensor, parts: Sequence[tuple[int, np.ndarray]]) -> torch.Tensor:
    left = tensor
    for dim, indices in parts:
        stays = np.setdiff1d(np.arange(tensor.shape[dim]), indices)
        left = left.index_select(dim, torch.from_numpy(stays).to(tensor.device))
    return nn.Parameter(left.clone(), requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left.clone()


def refit(module: nn.Module, old: nn.Module, bare: Sequence[int | None]) -> None:
    """Read the sizes that a module of torch remembers off its tensors, in place.

    Args:
        module: its tensors have been cut.
        old: what it was before.
        bare: sizes of a norm without tensors.
    """
    if isinstance(module, _ConvNd):
        _refit_convolution(module, old)
    elif isinstance(module, HeadAttention):
        module.refit()
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        sizes = module.weight.shape if module.weight is not None else _renewed(module.normalized_shape, bare)
        module.normalized_shape = tuple(sizes)
    elif isinstance(module, nn.GroupNorm):
        own = module.num_groups == module.num_channels
        (module.num_channels,) = module.weight.shape if module.weight is not None else _renewed((module.num_channels,), bare)
        module.num_groups = module.num_channels if own else module.num_groups
    elif isinstance(module, _NormBase):
        tensors = [t for t in (module.weight, module.running_mean) if t is not None]
        (module.num_features,) = tensors[0].shape if tensors else _renewed((module.num_features,), bare)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        _refit_recurrent(module, old)
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _refit_recurrent(module: nn.RNNBase, old: nn.Module) -> None:
    first, before = module.weight_ih_l0, old.weight_ih_l0
    assert isinstance(first, torch.Tensor)
    assert isinstance(before, torch.Tensor)
    module.input_size, module.hidden_size = first.shape[1], len(first) * module.hidden_size // len(before)
    if module.proj_size:
        module.proj_size = len(module.weight_hr_l0)  # type: ignore[arg-type]


def _refit_convolution(module: _ConvNd, old: nn.Module) -> None:
    first, second = module.weight.shape[:2]
    multiplier = old.out_channels // old.groups  # type: ignore[operator]
    if module.groups > 1 and module.groups == old.in_channels:  # depthwise: groups go with their channels
        module.groups = first if module.transposed else first // multiplier  # type: ignore[operator, assignment]
    grouped = second * module.groups
    module.in_channels, module.out_channels = (first, grouped) if module.transposed else (grouped, first)


def _renewed(sizes: Sequence[int], new: Sequence[int | None]) -> list[int]:
    return [size if changed is None else changed for size, changed in zip(sizes, new or [None] * len(sizes), strict=True)]


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
        return {}  # `refit` knows these
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
