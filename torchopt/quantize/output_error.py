"""Ranges of activations that cost the least at the network's outputs: what `observer="auto"` chooses.

    E‖ Δy ‖²  ≈  Σ_i g_i² (x_i − x̂_i)²        g = ∂(r·y) / ∂x,  r ~ N(0, 1):   E[g gᵀ] = JᵀJ

To first order the error of an output is the Jacobian times the errors of rounding and clipping, which are as good as independent. One
backward pass of a random projection estimates the diagonal of JᵀJ (Hutchinson 1990), so that a value which the network hardly reads may
be clipped, and one that it reads strongly is kept. The choice itself is the least squared error over a streaming histogram in which each
value counts g² (as in `ranges.mse_range`). Exact zeros, most of what a ReLU gives, are represented exactly and do not count.
No single observer wins on every network; this one measures what the others assume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchopt.gradients import random_projection
from torchopt.quantize.activations import ActivationQuantizer
from torchopt.quantize.corrections.walk import rounding
from torchopt.quantize.folding import folded_once
from torchopt.quantize.observers.histogram import StreamingHistogram
from torchopt.quantize.observers.ranges import mse_range
from torchopt.quantize.pieces import Call, kept
from torchopt.quantize.rounding import in_memory_order, order

SAMPLES = 64
MOST = 1 << 17  # values of one activation that a pass counts


def choose_ranges(model: nn.Module, calls: Sequence[Call], seed: int = 0) -> None:
    """Set the range of every quantizer whose observer is "auto"; one that no gradient reaches keeps the range that it has.

    Args:
        model: what `attach` returned, all ranges set.
        calls: samples, as the arguments of the model, a few in each so that a backward pass fits into memory.
        seed: of the projections.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer) and m.by_output]
    if not quantizers or not calls:
        return
    seen = {quantizer: StreamingHistogram().to(quantizer.min_val.device) for quantizer in quantizers}
    generator = torch.Generator().manual_seed(seed)
    with rounding(model, enabled=False), folded_once(model.modules()), torch.enable_grad():
        for args, kwargs in kept(calls, SAMPLES):
            for quantizer, x, gradient in _gradients(model, quantizers, args, kwargs, generator):
                _count(seen[quantizer], x, gradient)
    for quantizer, histogram in seen.items():
        if not histogram.empty and bool(torch.isfinite(histogram.counts).all()):
            low, high = mse_range(histogram, quantizer.quant_max - quantizer.quant_min)
            quantizer.set_range(torch.tensor(low), torch.tensor(high))


def _gradients(
    model: nn.Module, quantizers: list[ActivationQuantizer], args: Any, kwargs: Any, generator: torch.Generator
) -> Iterator[tuple[ActivationQuantizer, torch.Tensor, torch.Tensor]]:
    """Yield what each quantizer read, and the gradient of a random projection of the outputs."""
    read: list[tuple[ActivationQuantizer, torch.Tensor]] = []
    hooks = [q.register_forward_pre_hook(lambda module, given: read.append((module, given[0]))) for q in quantizers]
    try:
        outputs = model(*(_differentiable(a) for a in args), **{k: _differentiable(v) for k, v in kwargs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    reached = [(quantizer, x) for quantizer, x in read if x.requires_grad]
    projection = random_projection(outputs, generator) if reached else None
    if projection is None:
        return
    gradients = torch.autograd.grad(projection, [x for _, x in reached], allow_unused=True)
    for (quantizer, x), gradient in zip(reached, gradients, strict=True):
        if gradient is not None:
            yield quantizer, x.detach(), gradient


def _count(histogram: StreamingHistogram, x: torch.Tensor, gradient: torch.Tensor) -> None:
    every = x.numel() // MOST | 1  # odd, so that it does not follow rows
    weights = gradient.permute(order(x)).reshape(-1)[::every].double().square()
    values = in_memory_order(x)[::every]
    histogram.observe(values, weights * (values != 0))


def _differentiable(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floating else value
