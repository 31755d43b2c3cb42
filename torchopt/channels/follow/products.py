"""Where channels meet: index by index, or as the two sides of a product.

    index by index    x + y, x · γ, x + b: what is at the same place is one channel
    in a product      Σ_k a[…, k] · b[k, …]: the channels along k are one, and gone from the result

A convolution is a product over its input channels. In its groups each has a kernel of its own but shares the numbers of its weight's
input axis with the others, so that all groups keep channels at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from torchopt.channels.follow.call import Call
from torchopt.channels.follow.identity import FREE, Axes, Ids, real, shadow

if TYPE_CHECKING:
    from torchopt.channels.follow.trace import Trace

GROUPS = "they are tied to one another by a split into groups"


def broadcast(trace: Trace, operands: Sequence[torch.Tensor], shape: Sequence[int]) -> Axes:
    """The axes of a result in which operands meet; an axis of length one is stretched, and meets nothing."""
    axes: Axes = []
    for back in range(len(shape), 0, -1):
        here = [trace.of(t) for t in operands if t.dim() >= back and t.shape[-back] == shape[-back] > 1]
        axes.append(meet(trace, [found[-back] for found in here if found is not None]))
    return axes


def meet(trace: Trace, all_ids: Sequence[Ids | None]) -> Ids | None:
    """Join the identities of axes that are used index by index, and return those of the result."""
    all_ids = [ids for ids in all_ids if ids is not FREE] or list(all_ids[:1])
    channels = [ids for ids in all_ids if real(ids)]
    shadows = [ids for ids in all_ids if shadow(ids)]
    if not channels:
        return shadows[0] if shadows else next((ids for ids in all_ids if ids is FREE), None)
    reason = f"they meet an axis of fixed length in {trace.where}"
    for ids in channels[1:]:
        trace.identities.join(channels[0], ids, reason)
    if len(channels) == len(all_ids):
        return channels[0]
    trace.identities.fix(channels[0], reason)
    for ids in shadows:
        trace.prefer(ids)
    return None


def axes_of(trace: Trace, tensor: torch.Tensor) -> Axes:
    """The identities along the axes of a tensor; none for a constant."""
    return trace.of(tensor) or [None] * tensor.dim()


def stay(trace: Trace, all_ids: Sequence[Ids | None], reason: str) -> None:
    """Note that these channels must stay, and where."""
    for ids in all_ids:
        trace.identities.fix(ids, f"{reason} in {trace.where}")


def _contract(trace: Trace, a: torch.Tensor, i: int, b: torch.Tensor, j: int) -> None:
    """Axis `i` of `a` and axis `j` of `b` are multiplied and summed; a constant adapts to whatever it meets."""
    left, right = trace.of(a), trace.of(b)
    if left is not None and right is not None:
        meet(trace, [left[i], right[j]])


def mm(trace: Trace, call: Call) -> None:
    """mm and bmm, also with something added to the product."""
    a, b = call.tensors[-2:]
    _contract(trace, a, -1, b, -2)
    axes = [*axes_of(trace, a)[:-1], axes_of(trace, b)[-1]]
    if a.dim() == 3:
        axes[0] = _batch(trace, a, b)
    result = call.results[0]
    trace.axes[result] = axes
    if len(call.tensors) == 3:
        trace.axes[result] = broadcast(trace, [call.tensors[0], result], result.shape)


def mv(trace: Trace, call: Call) -> None:
    """A matrix times a vector, or two vectors: spectral norms."""
    a, b = call.tensors[-2:]
    _contract(trace, a, -1, b, -1)
    trace.axes[call.results[0]] = axes_of(trace, a)[:-1]


def _batch(trace: Trace, a: torch.Tensor, b: torch.Tensor) -> Ids | None:
    """The axis over which a batch of products runs: in attention the heads, which should carry the channels."""
    both = [axes[0] for axes in (trace.of(a), trace.of(b)) if axes is not None]
    for ids in both:
        if shadow(ids):
            trace.prefer(ids)
    return meet(trace, both)


def convolution(trace: Trace, call: Call) -> None:
    """Channels of the input meet the weight's input axis; its output axis goes on."""
    x, weight, bias, groups = (call.given[name] for name in ("input", "weight", "bias", "groups"))
    known, kernel = trace.of(x), axes_of(trace, weight)
    stay(trace, [*(known or [])[2:], *kernel[2:]], "they lie along a spatial axis")
    if known is not None and shadow(known[1]):
        trace.prefer(known[1])
    if call.given["transposed"]:
        made = _transposed(trace, x, weight, kernel, groups)
    elif groups > 1:
        made = _grouped(trace, known, weight, kernel, groups)
    else:
        _contract(trace, x, 1, weight, 1)
        made = kernel[0]
    if bias is not None and trace.of(bias) is not None:
        made = meet(trace, [made, axes_of(trace, bias)[0]])
    trace.axes[call.results[0]] = [known[0] if known else None, made, *[None] * (x.dim() - 2)]


def _grouped(trace: Trace, known: Axes | None, weight: torch.Tensor, kernel: Axes, groups: int) -> Ids | None:
    """Depthwise, a channel is its own group; else each group keeps as many channels as the others, at the same places."""
    made, channels = kernel[0], known[1] if known is not None else None
    if weight.shape[1] == 1:
        if known is not None:
            made = meet(trace, [made, None if channels is None else np.repeat(channels, weight.shape[0] // groups)])
        return made
    if known is not None:
        for part in [None] if channels is None else np.split(channels, groups):
            meet(trace, [kernel[1], part])
    if weight.shape[0] == groups:
        stay(trace, [made], "each is the only output of its group")
    alike(trace, made, groups)
    return made


def _transposed(trace: Trace, x: torch.Tensor, weight: torch.Tensor, kernel: Axes, groups: int) -> Ids | None:
    """The weight of a transposed convolution is (in, out / groups, …)."""
    _contract(trace, x, 1, weight, 0)
    if groups == 1:
        return kernel[1]
    if weight.shape[0] == groups and weight.shape[1] == 1:
        return kernel[0]
    if weight.shape[0] == groups:
        stay(trace, [kernel[0]], "each is the only input of its group")
    alike(trace, kernel[0], groups)
    return None if kernel[1] is None else np.tile(kernel[1], groups)


def alike(trace: Trace, ids: Ids | None, groups: int) -> None:
    """Tie the channels at the same place of each group."""
    if ids is not None and len(ids) > groups > 1:
        first, *others = np.split(ids, groups)
        for part in others:
            trace.identities.join(first, part, GROUPS)


def embedding(trace: Trace, call: Call) -> None:
    """Columns go on; rows are picked by number."""
    rows, columns = axes_of(trace, call.given["weight"])
    stay(trace, [rows], "they are looked up by number")
    result = call.results[0]
    trace.axes[result] = [*[None] * (result.dim() - 1), columns]
