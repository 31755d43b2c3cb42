"""Where channels go: views, permutations, slices, padding, concatenation.

The operator that moves values is run on the numbers of the channels as well, so that they lie where their values lie. A reshape that
splits an axis in two (heads and their width, groups and their channels) leaves the channels on one of the new axes, the last unless
asked otherwise, tied across the other. The other gets shadows, which remember that it could have been chosen (`Trace.prefer`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import torch

from torchopt.channels.follow.call import Call, tensors_in
from torchopt.channels.follow.identity import FREE, Axes, Ids, real
from torchopt.channels.follow.products import GROUPS, alike, axes_of, broadcast, stay

if TYPE_CHECKING:
    from torchopt.channels.follow.trace import Trace

RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
MOVEMENTS = RESHAPES | {
    "alias", "constant_pad_nd", "detach", "diagonal", "expand", "flip", "im2col", "lift_fresh", "permute", "pixel_shuffle",
    "pixel_unshuffle", "repeat", "roll", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold",
    "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze",
}  # fmt: skip


def cat(trace: Trace, call: Call) -> None:
    """Along the axis they follow each other; along the others they meet."""
    parts, result, dim = call.tensors, call.results[0], call.given["dim"] % call.results[0].dim()
    whole = [part for part in parts if part.dim() == result.dim()]  # an empty one-dimensional part is ignored by torch
    axes = broadcast(trace, whole, [1 if d == dim else size for d, size in enumerate(result.shape)])
    pieces = [axes_of(trace, part)[dim] for part in whole]
    if any(ids is not None for ids in pieces):
        fixed = [np.zeros(part.shape[dim], dtype=np.int64) for part in whole]
        axes[dim] = np.concatenate([zeros if ids is None else ids for ids, zeros in zip(pieces, fixed, strict=True)])
    trace.axes[result] = axes


def stack(trace: Trace, call: Call) -> None:
    """Everything meets; the new axis carries nothing."""
    result, dim = call.results[0], call.given["dim"] % call.results[0].dim()
    axes = broadcast(trace, call.tensors, [*result.shape[:dim], *result.shape[dim + 1 :]])
    trace.axes[result] = [*axes[:dim], None, *axes[dim:]]


def index(trace: Trace, call: Call) -> None:
    """Rows picked by number must be where they were; other axes go along."""
    indices = call.given.get("indices") or [None] * call.given["dim"] + [call.given["index"]]
    picked: set[int] = set()
    axis = 0
    for index in indices:
        width = index.dim() if index is not None and index.dtype == torch.bool else 1
        picked |= set(range(axis, axis + width)) if index is not None else set()
        axis += width
    stay(trace, [axes_of(trace, call.tensors[0])[d] for d in picked], "they are picked by number")
    movement(trace, call, without=picked)


def channel_shuffle(trace: Trace, call: Call) -> None:
    """A transposition of groups and channels, whose groups must stay equally wide."""
    alike(trace, axes_of(trace, call.tensors[0])[1], call.given["groups"])
    movement(trace, call)


def movement(trace: Trace, call: Call, without: Collection[int] = ()) -> None:
    """Move the numbers of each axis of channels, but those of the axes `without`, as the values were moved."""
    source = call.tensors[0]
    moved: list[Axes] = [[None] * result.dim() for result in call.results]
    for axis, ids in enumerate(axes_of(trace, source)):
        if ids is not None and len(ids) and axis not in without:
            for axes, numbers in zip(moved, _carried(call, source, axis, ids), strict=True):
                _place(trace, axes, numbers)
    for result, axes in zip(call.results, moved, strict=True):
        trace.axes[result] = axes
    if call.name == "expand":
        added = call.results[0].dim() - source.dim()
        stretched = [
            d for d, size in enumerate(call.results[0].shape) if size > 1 and (d < added or source.shape[d - added] == 1)
        ]
        for d in stretched:
            moved[0][d] = FREE


def _carried(call: Call, source: torch.Tensor, axis: int, ids: Ids) -> list[torch.Tensor]:
    """Run the operator on the numbers of one axis; float64 holds each exactly, and every operator takes it."""
    shape = [-1 if i == axis else 1 for i in range(source.dim())]
    numbers = torch.from_numpy(ids).double().to(source.device).reshape(shape).expand(source.shape)
    if call.name in RESHAPES:
        return [numbers.reshape(call.results[0].shape)]
    if call.name == "constant_pad_nd":
        return [_padded(call, numbers, axis)]
    return tensors_in(call.func(numbers, *call.args[1:], **call.kwargs))


def _padded(call: Call, numbers: torch.Tensor, axis: int) -> torch.Tensor:
    """What is put before and behind the channels is no channel; along the other axes, a constant reaches all of them alike."""
    shape, pad = call.results[0].shape, list(call.given["pad"])
    place = 2 * (numbers.dim() - 1 - axis)
    line = numbers[tuple(slice(None) if d == axis else slice(0, 1) for d in range(numbers.dim()))]
    if place < len(pad):
        line = call.func(line, [0] * place + pad[place : place + 2], 0)
    return line.expand(shape)


def _place(trace: Trace, axes: Axes, numbers: torch.Tensor) -> None:
    """Find along which axes the numbers run now, and let one of them carry the channels."""
    along = [d for d in range(numbers.dim()) if _varies(numbers, d)]
    if not along:  # a single channel was picked, or all of the axis are tied to one another
        stay(trace, [numbers.flatten()[:1].cpu().numpy().astype(np.int64)], "they are picked by number")
        return
    usual = 1 if along == [1, 2, 3] else along[-1]  # a vector that becomes an image; pixel shuffle
    carrier = trace.carrier(usual, along)
    essence = numbers[tuple(slice(None) if d in along else 0 for d in range(numbers.dim()))].cpu()  # one axis for each in `along`
    first, *others = essence.movedim(along.index(carrier), 0).flatten(1).unbind(1) if len(along) > 1 else [essence]
    ids = first.numpy().astype(np.int64)
    for other in others:
        trace.identities.join(ids, other.numpy().astype(np.int64), GROUPS)
    _settle(trace, axes, carrier, ids)
    for d in along:
        if d != carrier and axes[d] is None and ids.any():
            axes[d] = trace.new_shadow(d, numbers.shape[d])


def _settle(trace: Trace, axes: Axes, carrier: int, ids: Ids) -> None:
    """Put the numbers on an axis; two kinds of channels merged into one axis must stay, and shadows give way to channels."""
    there = axes[carrier]
    if real(there) and real(ids):
        stay(trace, [there, ids], "they are merged with other channels into one axis")
        axes[carrier] = np.zeros_like(ids)
    elif there is None or real(ids):
        axes[carrier] = ids


def _varies(numbers: torch.Tensor, dim: int) -> bool:
    if numbers.shape[dim] < 2 or numbers.stride(dim) == 0:
        return False
    return not torch.equal(numbers, numbers.narrow(dim, 0, 1).expand(numbers.shape))
