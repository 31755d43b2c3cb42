"""Calls cut along the batch into pieces whose activations stay in the processor's cache, images channels last.

A network takes what it takes from memory, not from arithmetic, once a batch's activations no longer fit the cache: MobileNetV2 runs a
picture in 35 ms at 20 pictures a call, and in 11 ms at 4 with channels last. What is learned from activations is the same either way,
as long as a sample's outputs do not depend on its neighbours; that is tried once, and where it does not hold the calls stay whole.
They do so, too, where the example inputs and a batch do not agree on which inputs have the samples in front: the nodes and the edges of a
graph, as many by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.errors import DataError

Call = tuple[tuple[Any, ...], dict[str, Any]]

PIECE = 4  # samples a call
SAME = 1e-3  # of the largest output: kernels add in another order for another number of samples


class Whole(tuple[Any, ...]):
    """The positional arguments of a call that is not to be cut."""


def in_pieces(
    model: nn.Module, calls: Iterable[Call], lengths: Sequence[int | None] = (), *, whole: bool = False
) -> Iterator[list[Call]]:
    """Yield each call as the pieces that together are it.

    Args:
        model: in evaluation mode.
        calls: its arguments; only those on a CPU are cut.
        lengths: of the example inputs along the first axis, as far as they are known.
        whole: cut none, because something counts batches.

    Example:
        >>> [[len(args[0]) for args, _ in call] for call in in_pieces(nn.ReLU(), [((torch.zeros(6, 2),), {})])]
        [[4, 2]]
    """
    stream = iter(calls)
    first = next(stream, None)
    if first is None:
        return
    here = all(x.device.type == "cpu" for x in _tensors(first))
    alone = _independent(model, first)
    for call in itertools.chain([first], stream):
        if not (alone and _agrees(call, lengths)):
            yield [(Whole(call[0]), call[1])]
            continue
        if whole or not here:
            yield [call]
            continue
        size = samples_of(call)
        yield [images_last(part(call, start, min(start + PIECE, size))) for start in range(0, size, PIECE)]


def samples_of(call: Call) -> int:
    """The length of the first tensor among the arguments: how many samples a call holds."""
    return next((len(x) for x in _tensors(call) if x.dim()), 1)


def part(call: Call, start: int, end: int) -> Call:
    """Return a call of samples `start` to `end`; tensors of another length, and all else, stay as they are, and so do whole calls."""
    args, kwargs = call
    if isinstance(args, Whole):
        return call
    size = samples_of(call)
    return tuple(_part(x, size, start, end) for x in args), {k: _part(x, size, start, end) for k, x in kwargs.items()}


def kept(calls: Iterable[Call], count: int) -> list[Call]:
    """Return the first calls that together hold `count` samples, the last one cut to fit.

    Example:
        >>> [len(args[0]) for args, _ in kept([((torch.zeros(3),), {})] * 4, 5)]
        [3, 2]
    """
    found: list[Call] = []
    for call in calls:
        size = samples_of(call)
        found.append(part(call, 0, min(size, count)))
        count -= size
        if count <= 0:
            break
    return found


def spread(calls: Sequence[Call], count: int) -> list[Call]:
    """Return calls from all over the list that together hold about `count` samples.

    Example:
        >>> [int(args[0]) for args, _ in spread([((torch.tensor([i]),), {}) for i in range(6)], 2)]
        [0, 3]
    """
    every = max(1, round(sum(map(samples_of, calls)) / count))
    return list(calls[::every])


def _part(value: Any, size: int, start: int, end: int) -> Any:
    if not (isinstance(value, torch.Tensor) and value.dim() and len(value) == size):
        return value
    return value[start:end]


def images_last(call: Call) -> Call:
    """Return the same call with its images channels last."""
    args, kwargs = call
    return tuple(_last(x) for x in args), {k: _last(x) for k, x in kwargs.items()}


def _last(value: Any) -> Any:
    images = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
    return value.contiguous(memory_format=torch.channels_last) if images else value


def _tensors(call: Call) -> list[torch.Tensor]:
    return [x for x in (*call[0], *call[1].values()) if isinstance(x, torch.Tensor)]


def _agrees(call: Call, lengths: Sequence[int | None]) -> bool:
    """True where the same inputs have the samples in front as in the example: those as long as the first."""
    size = samples_of(call)
    first = next((length for length in lengths if length is not None), None)
    pairs = [(x, length) for x, length in zip(call[0], lengths, strict=False) if isinstance(x, torch.Tensor) and x.dim()]
    return all((len(x) == size) == (length == first) for x, length in pairs if length is not None)


@torch.no_grad()
def _independent(model: nn.Module, call: Call) -> bool:
    """True where the second sample gives alone what it gives beside the first."""
    both, alone = part(call, 0, 2), part(call, 1, 2) if samples_of(call) > 1 else part(call, 0, 1)
    try:
        together, apart = (tree_leaves(model(*args, **kwargs)) for args, kwargs in map(images_last, (both, alone)))
    except Exception:  # whatever a forward says to another number of samples
        _try(model, call)
        return False  # a fixed batch size, say
    pairs = [(a, b) for a, b in zip(together, apart, strict=True) if isinstance(a, torch.Tensor)]
    return all(a.dim() > 0 and b.dim() > 0 and len(b) == 1 and _same(a[-1:], b) for a, b in pairs)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= SAME * one.abs().max()) if one.is_floating_point() else torch.equal(one, other)


def _try(model: nn.Module, call: Call) -> None:
    """Run a whole call.

    Raises:
        DataError: the model does not take it.
    """
    args, kwargs = call
    try:
        model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in _tensors(call))
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"calibrate: the model does not take batch 0, of shape {shapes}: {reason}; give it what forward takes"
        ) from error
