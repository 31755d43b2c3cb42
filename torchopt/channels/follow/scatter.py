"""Where values are put or fetched by number along some axes, and channels pass along the others.

index_add    y[i[n], c] += x[n, c]        messages of a graph network, summed at its nodes
gather       y[b, k, c] = x[b, i[b, k, c], c]        the experts that a router chose
index_put    y[mask] = v        masked steps of a sequence
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchopt.channels.follow.call import Call
from torchopt.channels.follow.identity import Axes
from torchopt.channels.follow.products import axes_of, meet, stay

if TYPE_CHECKING:
    from torchopt.channels.follow.trace import Trace

NUMBERED = "they are picked by number"


def along_one_axis(trace: Trace, call: Call) -> None:
    """`gather`, and what is its inverse: along one axis by number, along the others each at its place."""
    x, result, dim = call.given["self"], call.results[0], call.given["dim"] % max(call.results[0].dim(), 1)
    source = next((call.given[name] for name in ("source", "src") if isinstance(call.given.get(name), torch.Tensor)), None)
    operands = [x] if source is None else [x, source]
    stay(trace, [axes_of(trace, t)[dim] for t in operands if t.dim()], NUMBERED)
    axes: Axes = [None] * result.dim()
    for d in range(result.dim()):
        if d == dim:
            continue
        here = [axes_of(trace, t)[d] for t in operands if trace.of(t) is not None]
        if all(t.shape[d] == result.shape[d] for t in operands):
            axes[d] = meet(trace, here)
        else:
            stay(trace, here, NUMBERED)
    trace.axes[result] = axes


def index_put(trace: Trace, call: Call) -> None:
    """Some axes by number or mask; along those behind them, what is put meets what was there."""
    x, values, result = call.given["self"], call.given["values"], call.results[0]
    picked = 0
    for place, index in enumerate(call.given["indices"]):
        if index is None or place > picked:  # not the first axes
            stay(trace, [*axes_of(trace, x), *axes_of(trace, values)], NUMBERED)
            trace.axes[result] = [None] * result.dim()
            return
        picked += index.dim() if index.dtype == torch.bool else 1
    axes = list(axes_of(trace, x))
    stay(trace, axes[:picked], NUMBERED)
    axes[:picked] = [None] * picked
    for back in range(1, min(x.dim() - picked, values.dim()) + 1):
        if trace.of(values) is not None and values.shape[-back] == x.shape[-back]:
            axes[-back] = meet(trace, [axes[-back], axes_of(trace, values)[-back]])
    stay(trace, axes_of(trace, values)[: max(values.dim() - (x.dim() - picked), 0)], NUMBERED)
    trace.axes[result] = axes
