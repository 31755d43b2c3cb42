"""The channels of a network as groups of equals: each group is a width that can shrink, its channels interchangeable.

A channel is a connected component of indices (`identity.py`): row 5 of a convolution's weight, entry 5 of its bias and of the batch
norm behind it, column 5 of every layer that reads it. Channels that take the same number of indices on the same axes form a group:
the 64 channels that run through a residual stage, the 12 heads of an attention layer (64 rows of each projection a head).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchopt.channels.follow.identity import OUTPUT
from torchopt.channels.follow.products import GROUPS
from torchopt.channels.follow.trace import Seen
from torchopt.network.weights import Skipped

Axis = tuple[str, int]  # a tensor's name, and one of its dimensions
LAYERS = (_ConvNd, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Embedding)
MATRICES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of LAYERS
IGNORED = "they are ignored"


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Channels of which some can go.

    Attributes:
        axes: for each axis that they lie on, their indices there, int64 (channels, indices a channel).
        labels: the component that each channel is, int64 (channels,).
        layers: names of the layers that write them, or of all that hold them where these are no layers of torch.
        structure: equal for groups whose channels depend on one another in the same way.
        unit: how many features of an activation one channel is: 1, or the width of a head, or as many as there are groups.
    """

    axes: dict[Axis, np.ndarray]
    labels: np.ndarray
    layers: tuple[str, ...]
    structure: tuple[object, ...]
    unit: int = 1

    def __len__(self) -> int:
        return len(self.labels)


def find_groups(model: nn.Module, seen: Seen, ignore: Collection[str]) -> tuple[list[Group], list[Skipped], np.ndarray]:
    """Return the widths of `model` that can shrink, the layers that keep their channels and why, and the channel of each number.

    Args:
        model: the network that was followed.
        seen: what was found.
        ignore: names of modules whose outputs stay.
    """
    modules = dict(model.named_modules())
    for name, axes in seen.tensors.items():
        owner = name.rpartition(".")[0]
        if owner in ignore:
            for dim, ids in enumerate(axes):
                if dim == out_dim(modules[owner]) or not isinstance(modules[owner], LAYERS):
                    seen.identities.fix(ids, IGNORED)
    labels, reasons = seen.identities.components()
    groups = [group for group in _groups(modules, seen, labels, reasons) if len(group) > 1]
    shrinking = {layer for group in groups for layer in group.layers}
    return groups, _kept(modules, seen, labels, reasons, shrinking), labels


def out_dim(module: nn.Module) -> int:
    """Return the dimension of the output channels in the weights of `module`."""
    return 1 if isinstance(module, _ConvTransposeNd | nn.Embedding) else 0


def _groups(modules: dict[str, nn.Module], seen: Seen, labels: np.ndarray, reasons: dict[int, str]) -> list[Group]:
    places: dict[int, list[tuple[Axis, np.ndarray]]] = defaultdict(list)
    for name, axes in seen.tensors.items():
        for dim, ids in enumerate(axes):
            for label, indices in _by_label(labels, ids):
                places[label].append(((name, dim), indices))
    alike: dict[tuple[tuple[Axis, int], ...], list[int]] = defaultdict(list)
    for label, taken in places.items():
        if label not in reasons and len({name for (name, _), _ in taken}) > 1:
            alike[tuple((axis, len(indices)) for axis, indices in taken)].append(label)
    return [_group(modules, key, members, places) for key, members in alike.items()]


def _by_label(labels: np.ndarray, ids: np.ndarray | None) -> list[tuple[int, np.ndarray]]:
    """For each component on an axis, the indices where it lies."""
    if ids is None:
        return []
    here = labels[ids]
    order = np.argsort(here, kind="stable")
    found, starts = np.unique(here[order], return_index=True)
    return list(zip(found.tolist(), np.split(order, starts[1:]), strict=True))


def _group(
    modules: dict[str, nn.Module],
    key: tuple[tuple[Axis, int], ...],
    members: list[int],
    places: dict[int, list[tuple[Axis, np.ndarray]]],
) -> Group:
    layers, structure = [], []
    written, read, others = list[int](), list[int](), list[int]()
    for (name, dim), count in key:
        owner, _, parameter = name.rpartition(".")
        module = modules[owner]
        structure.append((type(module).__name__, parameter, dim, count))
        if isinstance(module, LAYERS) and parameter.startswith(MATRICES):
            shared = module.groups if isinstance(module, _ConvNd) and dim == 1 else 1  # dimension 1 is that of one group
            (written if dim == out_dim(module) else read).append(count * shared)
            layers += [owner] if dim == out_dim(module) else []
        others.append(count)
    return Group(
        axes={axis: np.stack([places[label][i][1] for label in members]) for i, (axis, _) in enumerate(key)},
        labels=np.array(members),
        layers=tuple(dict.fromkeys(layers or [name.rpartition(".")[0] for (name, _), _ in key])),
        structure=tuple(sorted(structure)),
        unit=min(map(max, [side for side in (written, read) if side] or [[min(others)]])),
    )


def _kept(
    modules: dict[str, nn.Module], seen: Seen, labels: np.ndarray, reasons: dict[int, str], shrinking: set[str]
) -> list[Skipped]:
    kept: dict[str, Skipped] = {}
    for name, axes in seen.tensors.items():
        owner = name.rpartition(".")[0].partition(".parametrizations.")[0]
        module = modules[owner]
        ids = axes[out_dim(module)] if len(axes) > 1 else None
        if owner not in shrinking | kept.keys() and isinstance(module, LAYERS) and ids is not None:
            reason = reasons.get(int(labels[ids[0]]), GROUPS)
            if reason not in (OUTPUT, IGNORED):
                kept[owner] = Skipped(name=owner, technique="shrink", reason=f"keeps its channels: {reason}")
    return list(kept.values())


def scope(group: Group) -> str:
    """Return the dotted path of the smallest module that holds all weights of a group."""
    owners = zip(*(name.split(".")[:-1] for name, _ in group.axes), strict=False)
    return ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, owners))
