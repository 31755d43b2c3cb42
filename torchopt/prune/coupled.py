"""Masks over coupled channels: what one channel lies on, in every weight, bias and norm, is zero together.

    m[row c of what writes it] = m[entry c of bias and norm] = m[column c of what reads it] = 0

A mask over the rows of one convolution leaves its batch norm's shift, and the layers that share its channels: such a channel still
carries something, and removing it changes the network. Here the channels are found as `shrink` finds them, and only widths are masked
whose channels can be removed without changing what the masked network computes; `shrink(model, inputs, masked=True)` removes exactly
those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchopt.channels import Channels
from torchopt.errors import ConfigError, RuleError
from torchopt.network.weights import Skipped, find_weight, is_pruned
from torchopt.prune.attach import first_mask
from torchopt.prune.config import Prune
from torchopt.prune.mask import Coupling, Mask


@dataclass(frozen=True, kw_only=True)
class Coupled:
    """What is masked together.

    Attributes:
        config: how.
        tensors: for each parameter, the groups of channels on its axes.
        skipped: the layers that a rule asks for and that are left alone.
    """

    config: Prune
    tensors: Mapping[str, tuple[Coupling, ...]]
    skipped: tuple[Skipped, ...] = ()


def couple(model: nn.Module, layers: Mapping[str, Prune], example_inputs: tuple[Any, ...] | None) -> Coupled | None:
    """Find the coupled channels of the layers whose rules say scope="coupled"; None where there are none.

    Args:
        model: the network before anything stands on it.
        layers: by module name, how each is pruned.
        example_inputs: the positional arguments of one forward call.

    Raises:
        ConfigError: no example inputs, or rules that differ.
        RuleError: no channel of these layers can be masked so.
    """
    asked = {name: config for name, config in layers.items() if config.scope == "coupled"}
    if not asked:
        return None
    config, *others = dict.fromkeys(asked.values())
    if example_inputs is None:
        raise ConfigError("prepare: scope='coupled' needs example_inputs, on which the channels of coupled layers are found")
    if others:
        raise ConfigError(
            "prepare: rules with scope='coupled' differ in their schedule or score; coupled layers need the same one"
        )
    channels = Channels(model, example_inputs)
    channels.keep_exact()
    tensors: dict[str, list[Coupling]] = {}
    skipped = {skip.name: skip.reason for skip in channels.kept}
    parameters, written = dict(channels.model.named_parameters()), set[str]()
    for key, group in enumerate(channels.groups):
        outside = [layer for layer in group.layers if layer not in asked]
        if outside:
            skipped |= dict.fromkeys(group.layers, f"shares its channels with {outside[0]}, which no such rule covers")
            continue
        written |= set(group.layers)
        for (name, dim), indices in group.axes.items():
            if name in parameters:
                tensors.setdefault(name, []).append(Coupling(key=key, dim=dim, indices=torch.from_numpy(indices)))
    if not tensors:
        layer, reason = next(((n, r) for n, r in skipped.items() if n in asked), (next(iter(asked)), "reaches an output"))
        raise RuleError(f"prune: scope='coupled' can mask nothing; {layer} {reason}")
    left = {name: skipped.get(name, "its outputs are outputs of the network") for name in asked if name not in written}
    return Coupled(
        config=config,
        tensors={name: tuple(found) for name, found in tensors.items()},
        skipped=tuple(Skipped(name=name, technique="prune", reason=reason) for name, reason in left.items()),
    )


def attach_coupled(model: nn.Module, coupled: Coupled, *, preserve: bool) -> None:
    """Put the masks on, in place.

    Raises:
        RuleError: a tensor is masked by another rule, or gone: fused for quantization.
    """
    for name, couplings in coupled.tensors.items():
        weight = find_weight(model, name)
        if weight is None:
            raise RuleError(
                f"prune: {name} is coupled with channels that scope='coupled' masks, and quantization has replaced it; prune, finalize "
                "and shrink first, then quantize"
            )
        if is_pruned(weight.module, weight.param):
            raise RuleError(
                f"prune: {name} is coupled with channels that scope='coupled' masks, and another rule masks it; give one"
            )
        votes = weight.trainable.dim() > 1 and (coupled.config.score != "wanda" or isinstance(weight.module, nn.Linear | _ConvNd))
        config = coupled.config if votes else replace(coupled.config, score="magnitude")
        mask, floor = first_mask(weight, preserve)
        device = weight.trainable.device
        places = tuple(replace(c, indices=c.indices.to(device)) for c in couplings)
        Mask(weight, config, places if votes else tuple(replace(c, votes=False) for c in places)).install(
            weight.module, mask, floor=floor
        )


def decide(placed: Sequence[tuple[nn.Module, Mask]], values: Mapping[str, torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """Return new masks, in the order of `placed`: of each group, the channels that matter least go everywhere.

    Args:
        placed: the coupled masks of a model.
        values: the scores of the weights that have a vote, by name.
        sparsity: fraction of the channels of each group that go.
    """
    votes: dict[int, list[torch.Tensor]] = {}
    for _, mask in placed:
        for coupling in mask.couplings:
            if coupling.votes:
                rows = values[mask.weight_name].abs().float().movedim(coupling.dim, 0).flatten(1).mean(dim=1)
                one = rows[coupling.indices].mean(dim=1)
                votes.setdefault(coupling.key, []).append(one / one.mean().clamp_min(1e-30))
    gone = {}
    for key, found in votes.items():
        score = torch.stack(found).mean(dim=0)
        keep = kept_of(len(score), sparsity)
        gone[key] = torch.argsort(score, stable=True)[: len(score) - keep]
    masks = []
    for module, mask in placed:
        new = torch.ones_like(mask.mask(module))
        for coupling in mask.couplings:
            new.index_fill_(coupling.dim, coupling.indices[gone[coupling.key]].reshape(-1), False)
        masks.append(new)
    return masks


def kept_of(count: int, sparsity: float) -> int:
    """Return how many of `count` channels stay.

    Example:
        >>> kept_of(8, 0.5), kept_of(3, 0.99)
        (4, 1)
    """
    return max(round(count * (1.0 - sparsity)), 1)


def damaged_coupled(placed: Sequence[tuple[nn.Module, Mask]], sparsities: Sequence[float]) -> str | None:
    """Say which coupled mask is none that a choice at one of these sparsities leaves, or None."""
    for module, mask in placed:
        now = mask.mask(module) != 0
        for coupling in mask.couplings:
            alive = now.movedim(coupling.dim, 0).reshape(now.shape[coupling.dim], -1).any(dim=1)[coupling.indices]
            if not torch.equal(alive.any(dim=1), alive.all(dim=1)) and not mask.remembers(module):
                return f"the mask of {mask.weight_name} keeps parts of channels, and each is kept or pruned whole"
            count, kept = len(alive), int(alive.any(dim=1).sum())
            allowed = [kept_of(count, sparsity) for sparsity in sparsities]
            if kept not in allowed and not (kept < max(allowed) and mask.remembers(module)):
                return f"the mask of {mask.weight_name} keeps {kept} of {count} channels, and its schedule {allowed[0]}"
    return None
