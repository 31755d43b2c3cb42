"""What each operator does to the channels of its operands: the table behind `trace.py`.

    index by index, products    `products.py`
    movements                   `movements.py`
    statistics                  norms, means, softmax over channels: they will see only those that are left
    other reductions            of an axis of channels, which must stay, except sums and norms, to which zeros add nothing
    spatial                     pooling and resizing: channels pass, what lies along the spatial axes must stay

Whatever is none of these makes everything that it touches stay, so that an operator unknown here costs compression and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from torchopt.channels.follow.call import Call
from torchopt.channels.follow.identity import Axes, real
from torchopt.channels.follow.movements import MOVEMENTS, cat, channel_shuffle, index, movement, stack
from torchopt.channels.follow.products import alike, axes_of, broadcast, convolution, embedding, meet, mm, mv, stay
from torchopt.channels.follow.scatter import along_one_axis, index_put

if TYPE_CHECKING:
    from torchopt.channels.follow.trace import Trace

SUMS = {"sum", "norm", "linalg_vector_norm"}
SOFTMAXES = {"_log_softmax", "_safe_softmax", "_softmax"}
NORMS = {"native_layer_norm", "native_group_norm"}
TRAINED_NORMS = {"_native_batch_norm_legit", "cudnn_batch_norm", "native_batch_norm"}  # statistics of the batch, if it says so
STATISTICS = (
    SOFTMAXES | NORMS | TRAINED_NORMS | {"amax", "amin", "logsumexp", "max", "mean", "min", "std", "std_mean", "var", "var_mean"}
)
OTHERS = {"all", "any", "argmax", "argmin", "cumprod", "cumsum", "logcumsumexp", "median", "prod", "sort", "topk"}
BATCH_NORMS = TRAINED_NORMS | {"_native_batch_norm_legit_no_training"}
SPATIAL = re.compile(r"(?:pool|upsample|pad|grid_sampler)\w*?(\d)d")
CONSTANTS = re.compile(r"new_\w+|_local_scalar_dense|equal|is_nonzero")
POINTWISE = {  # beyond those that torch itself marks so; it came late to those that write in place
    "_prelu_kernel", "_to_copy", "as_strided", "bernoulli", "celu", "copy", "elu", "empty_like", "fill", "full_like", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "native_dropout", "ones_like", "rand_like", "randn_like", "selu", "zero", "zeros_like",
}  # fmt: skip


def apply_rule(trace: Trace, call: Call) -> None:
    """Note what the results of one operator carry; what is made of constants alone is a constant."""
    if all(trace.of(tensor) is None for tensor in call.tensors) or CONSTANTS.fullmatch(call.name):
        return
    spatial = SPATIAL.search(call.name)
    rule = RULES.get(call.name)
    if rule is not None:
        rule(trace, call)
    elif spatial is not None:
        _spatial(trace, call, int(spatial[1]))
    elif call.name in POINTWISE or torch.Tag.pointwise in call.func.tags:
        for result in call.results:
            trace.axes[result] = broadcast(trace, call.tensors, result.shape)
    else:
        for tensor in call.tensors:
            stay(trace, axes_of(trace, tensor), f"they go through the operator {call.name}")
        for result in call.results:
            trace.axes[result] = [None] * result.dim()


def _batch_norm(trace: Trace, call: Call) -> None:
    x, result = call.tensors[0], call.results[0]
    axes = axes_of(trace, x)
    known = [found for found in map(trace.of, call.tensors[1:]) if found is not None]
    channels = meet(trace, [*axes[1:2], *(found[0] for found in known)])
    trace.axes[result] = [axes[0], channels, *axes[2:]]
    if call.name in TRAINED_NORMS:
        _see(trace, axes, [d for d in range(x.dim()) if d != 1])


def _layer_norm(trace: Trace, call: Call) -> None:
    x, count = call.given["input"], len(call.given["normalized_shape"])
    _normed(trace, call, list(range(x.dim() - count, x.dim())))


def _group_norm(trace: Trace, call: Call) -> None:
    alike(trace, axes_of(trace, call.given["input"])[1], call.given["group"])
    _normed(trace, call, [1])


def _normed(trace: Trace, call: Call, along: list[int]) -> None:
    """Statistics run over the axes `along`, which weight and bias have too."""
    axes = list(axes_of(trace, call.given["input"]))
    affine = [found for name in ("weight", "bias") if (found := trace.of(call.given[name])) is not None]
    for i, axis in enumerate(along):
        axes[axis] = meet(trace, [axes[axis], *(found[i] for found in affine)])
    trace.axes[call.results[0]] = axes
    _see(trace, axes, along)


def _see(trace: Trace, axes: Axes, along: Iterable[int]) -> None:
    """Remember over which channels this statistic runs."""
    trace.seen.statistics[-1] = {axis: ids for axis in along if real(ids := axes[axis])}


def _weight_norm(trace: Trace, call: Call) -> None:
    """v · g / ‖v‖: g has one entry for each index of the axis `dim`; zeros add nothing to the norm over the others."""
    axes, dim = list(axes_of(trace, call.given["v"])), call.given["dim"]
    axes[dim] = meet(trace, [axes[dim], axes_of(trace, call.given["g"])[dim]])
    trace.axes[call.results[0]] = axes


def _reduction(trace: Trace, call: Call) -> None:
    x = call.tensors[0]
    dims = call.given.get("dim")
    dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    over = sorted({d % x.dim() for d in dims}) if x.dim() else []
    axes = axes_of(trace, x)
    if call.name in STATISTICS:
        _see(trace, axes, over)
    elif call.name not in SUMS:
        stay(trace, [axes[d] for d in over], f"they are reduced by {call.name}")
        axes = [None if d in over else ids for d, ids in enumerate(axes)]
    for result in call.results:
        if result.dim() == x.dim():
            trace.axes[result] = [ids if result.shape[d] > 1 else None for d, ids in enumerate(axes)]
        else:
            trace.axes[result] = [ids for d, ids in enumerate(axes) if d not in over][: result.dim()]


def _spatial(trace: Trace, call: Call, rank: int) -> None:
    x = call.tensors[0]
    axes = axes_of(trace, x)
    stay(trace, axes[x.dim() - rank :], "they lie along a spatial axis")
    for result in call.results:
        trace.axes[result] = [*axes[: x.dim() - rank], *[None] * rank]


def _roi(trace: Trace, call: Call) -> None:
    """Regions of interest: (regions, channels, height, width)."""
    axes = axes_of(trace, call.tensors[0])
    stay(trace, axes[2:], "they lie along a spatial axis")
    trace.axes[call.results[0]] = [None, axes[1], None, None]


def _glu(trace: Trace, call: Call) -> None:
    axes = list(axes_of(trace, call.given["self"]))
    ids = axes[call.given["dim"]]
    if ids is not None:
        axes[call.given["dim"]] = meet(trace, np.split(ids, 2))
    trace.axes[call.results[0]] = axes


RULES: dict[str, Callable[[Trace, Call], None]] = {
    **dict.fromkeys(MOVEMENTS, movement),
    **dict.fromkeys((STATISTICS - NORMS - TRAINED_NORMS) | SUMS | OTHERS, _reduction),
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), mm),
    **dict.fromkeys(("mv", "dot", "vdot"), mv),
    **dict.fromkeys(("embedding", "_embedding_bag"), embedding),
    **dict.fromkeys(("index", "index_select"), index),
    **dict.fromkeys(("roi_align", "roi_pool"), _roi),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    **dict.fromkeys(("gather", "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce"), along_one_axis),
    "_weight_norm_interface": _weight_norm,
    "cat": cat,
    "convolution": convolution,
    "glu": _glu,
    "index_put": index_put,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "stack": stack,
}
