"""Which channels of a group matter least, and how many of each group go.

    magnitude   Σ w²         Li et al., "Pruning filters for efficient ConvNets" (2016, arXiv:1608.08710), over all of the group
    taylor      Σ |w·g|      Molchanov et al., "Importance estimation for neural network pruning" (2019, arXiv:1906.10771)
    lamp        Σ w² / Σ of those not smaller    Lee et al., "Layer-adaptive sparsity" (2020, arXiv:2010.07611)
    fpgm        distance to the other filters    He et al., "Filter pruning via geometric median" (2018, arXiv:1811.00250)
    bn_scale    |γ|          Liu et al., "Network slimming" (2017, arXiv:1708.06519)

A channel's score is the mean over the slices of weights that are its own (rows of what writes it, columns of what reads it, its
entries in norms), divided by the mean of its group, so that widths of different layers can be ranked together. torch-pruning's
importances see only those slices of convolutions, linear layers and norms that its own graph lists; these see every weight that a
channel lies on: embeddings, recurrent layers, attention, other people's modules.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from torchopt.channels.groups import Group
from torchopt.errors import ConfigError, StateError, nearest

IMPORTANCES = ("magnitude", "taylor", "lamp", "fpgm", "bn_scale", "random")


def check_importance(importance: str) -> None:
    """Refuse an unknown way of ranking channels.

    Raises:
        ConfigError: it is none of `IMPORTANCES`.
    """
    if importance not in IMPORTANCES:
        choices = ", ".join(IMPORTANCES)
        raise ConfigError(f"shrink: importance={importance!r}; one of {choices} is needed{nearest(str(importance), IMPORTANCES)}")


@torch.no_grad()
def scores(model: nn.Module, group: Group, importance: str, seed: int = 0) -> np.ndarray | None:
    """Return how much each channel of a group matters, float64 (channels,), or None where nothing of it can be ranked so.

    Raises:
        StateError: importance "taylor", and no weight of the model has a gradient, or one is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> net[0].weight.data, net[1].weight.data = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0, 0.0]])
        >>> group = Group(axes={("0.weight", 0): np.array([[0], [1]]), ("1.weight", 1): np.array([[0], [1]])}, labels=np.array([0, 1]),
        ...     layers=("0",), structure=())
        >>> scores(net, group, "magnitude").round(3).tolist()  # (1 + 4) / 2 and (9 + 0) / 2, over their mean
        [0.714, 1.286]
    """
    if importance == "taylor" and all(p.grad is None for p in model.parameters()):
        name = next(name for name, _ in group.axes)
        raise StateError(f"shrink: importance='taylor' reads gradients, and {name} has none; run backward on the model first")
    if importance == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.layers[0]}".encode()))
        return torch.rand(len(group), dtype=torch.float64, generator=generator).numpy()
    parts = [
        _of_axis(weight, dim, torch.from_numpy(indices), importance, name)
        for (name, dim), indices in group.axes.items()
        if (weight := _ranked_by(model, name, importance)) is not None
    ]
    if not parts:
        return None
    mean: np.ndarray = torch.stack(parts).double().mean(dim=0).numpy()
    return _lamp(mean) if importance == "lamp" else mean / max(float(mean.mean()), 1e-300)


def _ranked_by(model: nn.Module, name: str, importance: str) -> nn.Parameter | None:
    """The weight of this name, where it has a say: matrices and kernels, and the scales of norms; no biases, no statistics."""
    owner, _, parameter = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = module._parameters.get(parameter)
    if weight is None:
        return None
    norm = parameter == "weight" and isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm)
    if importance == "bn_scale":
        return weight if norm and isinstance(module, _NormBase) else None
    if importance == "taylor" and weight.grad is None:  # frozen, or not in the loss: it has no say
        return None
    return weight if weight.dim() > 1 or (norm and importance != "fpgm") else None


def _of_axis(weight: nn.Parameter, dim: int, indices: torch.Tensor, importance: str, name: str) -> torch.Tensor:
    """What the slices of one axis say: float (channels,).

    Raises:
        StateError: importance "taylor" and a gradient that is not finite.
    """
    if importance == "fpgm":
        filters = weight.movedim(dim, 0).flatten(1)[indices].flatten(1).float()
        return torch.cdist(filters, filters).sum(dim=1)
    if importance == "taylor":
        assert weight.grad is not None
        if not bool(torch.isfinite(weight.grad).all()):
            raise StateError(
                f"shrink: importance='taylor' reads gradients, and that of {name} holds NaN or infinity; take one from a step that "
                "mixed precision does not skip"
            )
        measured = (weight * weight.grad).abs()
    else:
        measured = weight.abs() if importance == "bn_scale" else weight.square()
    rows = measured.float().movedim(dim, 0).flatten(1).sum(dim=1) if weight.dim() > 1 else measured.float()
    return rows[indices].sum(dim=1)


def _lamp(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    rising = values[order]
    result = np.empty_like(values)
    result[order] = rising / np.maximum(np.cumsum(rising[::-1])[::-1], 1e-300)
    return result


@torch.no_grad()
def dead(model: nn.Module, group: Group) -> np.ndarray:
    """Return which channels of a group are zero along a whole slice of a weight, bool (channels,); one is always left.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        >>> net[0].weight.data = torch.tensor([[0.0], [3.0]])
        >>> group = Group(axes={("0.weight", 0): np.array([[0], [1]])}, labels=np.array([0, 1]), layers=("0",), structure=())
        >>> dead(net, group).tolist()
        [True, False]
    """
    found = np.zeros(len(group), dtype=bool)
    parameters = dict(model.named_parameters())
    for (name, dim), indices in group.axes.items():
        weight = parameters.get(name)
        if weight is not None and weight.dim() > 1:
            empty = (weight == 0).movedim(dim, 0).flatten(1).all(dim=1).cpu().numpy()
            found |= empty[indices].all(axis=1)
    if found.all():
        found[-1] = False
    return found


def choose(
    groups: Sequence[Group],
    ranks: Sequence[np.ndarray],
    ratio: float,
    *,
    round_to: int,
    global_ranking: bool,
    isomorphic: bool,
    ratios: Mapping[str, float],
    ties: Sequence[Sequence[Group]] = (),
) -> list[np.ndarray]:
    """Return for each group which channels go, bool (channels,).

    Args:
        groups: widths that can shrink.
        ranks: the scores of their channels.
        ratio: fraction of features to remove, of each group or of all that are ranked together.
        round_to: what remains of a group is a multiple of this many features, and at least one multiple.
        global_ranking: rank the channels of all groups together.
        isomorphic: rank the channels of groups with equal structure together (arXiv:2407.04616).
        ratios: other ratios for groups that hold the outputs of these layers, each ranked by itself; of several, the smallest.
        ties: groups that must keep equally many features.
    """
    kept = [len(group) for group in groups]
    scopes: dict[object, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        own = [ratios[layer] for layer in group.layers if layer in ratios]
        if own or not (global_ranking or isomorphic):
            kept[i] = _rounded(len(group), int(len(group) * (1.0 - min(own, default=ratio)) + 1e-9), _multiple(group, round_to))
        else:
            scopes[group.structure if isomorphic else None].append(i)
    for members in scopes.values():
        _rank_together([groups[i] for i in members], [ranks[i] for i in members], ratio, round_to, kept, members)
    for tie in ties:
        _tie([groups.index(group) for group in tie], groups, kept, round_to)
    return [_lowest(rank, len(rank) - count) for rank, count in zip(ranks, kept, strict=True)]


def _tie(members: Sequence[int], groups: Sequence[Group], kept: list[int], round_to: int) -> None:
    """Let groups of equal width keep as much as the one that keeps most, rounded to what all of them can keep."""
    width = len(groups[members[0]]) * groups[members[0]].unit
    multiple = math.lcm(round_to, *(groups[i].unit for i in members))
    features = _rounded(width, max(kept[i] * groups[i].unit for i in members), multiple)
    for i in members:
        kept[i] = features // groups[i].unit


def _multiple(group: Group, round_to: int) -> int:
    """How many channels of a group make its features a multiple of `round_to`."""
    return round_to // math.gcd(round_to, group.unit)


def _rounded(count: int, wanted: int, multiple: int) -> int:
    """The multiple at or below `wanted`, and at least one; a group that is smaller, or loses nothing, stays whole."""
    return count if wanted >= count else min(count, max(wanted - wanted % multiple, multiple))


def _rank_together(
    groups: Sequence[Group], ranks: Sequence[np.ndarray], ratio: float, round_to: int, kept: list[int], members: Sequence[int]
) -> None:
    """As few of the lowest of all channels as make, after rounding, at least `ratio` of all features go; found by bisection."""
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    rising = owners[np.argsort(np.concatenate(ranks), kind="stable")]

    def counts(lowest: int) -> list[int]:
        gone = np.bincount(rising[:lowest], minlength=len(groups))
        return [_rounded(len(g), len(g) - int(n), _multiple(g, round_to)) for g, n in zip(groups, gone, strict=True)]

    goal = (1.0 - ratio) * sum(len(group) * group.unit for group in groups)
    low, high = 0, len(rising)
    while low < high:
        middle = (low + high) // 2
        left = sum(count * group.unit for count, group in zip(counts(middle), groups, strict=True))
        low, high = (low, middle) if left <= goal + 1e-9 else (middle + 1, high)
    for i, count in zip(members, counts(low), strict=True):
        kept[i] = count


def _lowest(rank: np.ndarray, count: int) -> np.ndarray:
    gone = np.zeros(len(rank), dtype=bool)
    gone[np.argsort(rank, kind="stable")[:count]] = True
    return gone
