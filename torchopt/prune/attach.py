"""Masks on and off: `attach` puts one on each weight that a rule prunes, `bake` leaves plain weights with exact zeros.

Nothing changes in the model unless every weight asked for can be pruned as asked: all checks come before the first change. What
is left alone, and why, is returned. With `preserve`, the zeros found in a weight are a floor: they stay, and no weight masked
later comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import PruningContainer

from torchopt.errors import RuleError, StateError
from torchopt.network.weights import Skipped, Weight, is_pruned
from torchopt.prune.config import Prune
from torchopt.prune.mask import Mask

Pair = tuple[Weight, Prune]


def attach(pairs: Sequence[Pair], *, preserve: bool) -> list[Skipped]:
    """Put a mask on each weight, in place: all ones, or with `preserve` ones where the weight is not zero.

    Args:
        pairs: weights and how to prune them.
        preserve: zeros found in a weight stay zero for good.

    Returns:
        The weights that were left alone, with the reason.

    Raises:
        RuleError: a pattern does not fit a weight's rank, or nothing is left to prune.
        StateError: a weight carries a mask already.

    Example:
        >>> from torchopt.network.weights import weights
        >>> net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
        >>> [s.name for s in attach([(w, Prune(schedule=0.5)) for w in weights(net)], preserve=True)]
        ['0.weight']
        >>> [name for name, _ in net[1].named_buffers()]
        ['weight_mask', 'weight_floor']
    """
    chosen, skipped, owners = [], [], dict[int, str]()
    for weight, config in pairs:
        _check(weight, config)
        owner = owners.setdefault(id(weight.trainable), weight.name)
        reason = f"is the same Parameter as {owner}" if owner != weight.name else _reason_to_skip(weight, config)
        if reason is None:
            chosen.append((weight, config))
        else:
            skipped.append(Skipped(name=weight.name, technique="prune", reason=reason))
    if skipped and not chosen:
        raise RuleError(f"prune: nothing is left to prune; {skipped[0].name} {skipped[0].reason}")
    for weight, config in chosen:
        mask, floor = first_mask(weight, preserve)
        Mask(weight, config).install(weight.module, mask, floor=floor)
    return skipped


def bake(model: nn.Module) -> None:
    """Write the zeros into the weights and take every mask off, in place; parameters have their names and order of before."""
    for module, mask in installed(model):
        mask.remove(module)
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is mask]:
            del module._forward_pre_hooks[key]


def mask_of(weight: Weight) -> torch.Tensor | None:
    """Return the mask on `weight`, bool, of its shape, or None where it has none."""
    return weight.module._buffers[f"{weight.param}_mask"] if is_pruned(weight.module, weight.param) else None


def installed(model: nn.Module) -> list[tuple[nn.Module, Mask]]:
    """List the masks of torchopt in `model` with the modules that they stand in."""
    return list(_installed(model))


def _installed(model: nn.Module) -> Iterator[tuple[nn.Module, Mask]]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Mask):
                if hook._tensor_name in module._parameters:
                    raise StateError(
                        f"{hook.weight_name}: was assigned after prepare, beside the masked weight that trains; tie or replace weights "
                        "before prepare"
                    )
                yield module, hook
            elif isinstance(hook, PruningContainer) and any(isinstance(method, Mask) for method in hook):
                raise StateError(
                    f"{type(module).__name__}.{hook._tensor_name}: another mask of torch.nn.utils.prune was put over torchopt's; "
                    "remove it, and prepare the model again"
                )


def _check(weight: Weight, config: Prune) -> None:
    if is_pruned(weight.module, weight.param):
        raise StateError(f"{weight.name}: carries a mask already; finalize the model, or call torch.nn.utils.prune.remove, first")
    rank = weight.trainable.dim()
    if config.pattern != "element" and rank < 2:
        raise RuleError(
            f"{weight.name}: has {rank} dimension{'s' * (rank != 1)}, and pattern={config.pattern!r} needs at least 2 "
            "(output channels, input channels); use pattern='element'"
        )


def _reason_to_skip(weight: Weight, config: Prune) -> str | None:
    """Say why this weight should be left alone, or None."""
    value = weight.trainable
    if weight.depthwise and not config.include_depthwise:
        return "is a depthwise convolution: few weights that matter much; include_depthwise=True prunes it"
    if value.numel() == 1:
        return "is a single number, and the last weight of a tensor is kept"
    if config.only_where_faster is not None and config.pattern != "channel":
        return (
            f"would run no faster on {config.only_where_faster}, which computes zeros like any other weight; "
            "prune channels (pattern='channel', torchopt.shrink) for speed"
        )
    return _unable(weight, config, value)


def _unable(weight: Weight, config: Prune, value: torch.Tensor) -> str | None:
    """Say which pattern or score cannot act on this weight, or None."""
    if config.pattern == "n:m" and config.n is not None:
        inputs = value.shape[in_axis(weight.out_axis)]
        if inputs <= config.n:
            return f"has {inputs} input channel{'s' * (inputs != 1)}, of which {config.n}:{config.m} keeps all"
    if config.pattern == "channel" and value.shape[weight.out_axis] == 1:
        return "has a single output channel"
    if config.score == "wanda" and not isinstance(weight.module, nn.Linear | _ConvNd):
        return "is not multiplied with its module's input, whose norm score='wanda' needs; convolutions and linear layers are"
    return None


def in_axis(out_axis: int) -> int:
    """Return the axis of the input channels: 0 for transposed convolutions, else 1."""
    return 1 - out_axis


def first_mask(weight: Weight, preserve: bool) -> tuple[torch.Tensor, bool]:
    """Return the mask to start with, and whether it holds zeros to keep; a weight of nothing but zeros was never pruned."""
    value = weight.trainable.detach()
    if preserve:
        mask = value != 0
        if 0 < int(torch.count_nonzero(mask)) < mask.numel():
            return mask, True
    return torch.ones_like(value, dtype=torch.bool), False
