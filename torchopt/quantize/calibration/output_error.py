"""Ranges of activations that cost the least at the network's outputs: what `observer="auto"` chooses.

    E‖ Δy ‖²  ≈  Σ_i g_i² (x_i − x̂_i)²        g = ∂(r·y) / ∂x,  r ~ N(0, 1):   E[g gᵀ] = JᵀJ

To first order the error of an output is the Jacobian times the errors of rounding and clipping, which are as good as independent. One
backward pass of a random projection estimates the diagonal of JᵀJ (Hutchinson 1990), so that a value which the network hardly reads may
be clipped, and one that it reads strongly is kept. The choice itself is the least squared error over a streaming histogram in which each
value counts g² (as in `ranges.mse_range`). Exact zeros, most of what a ReLU gives, are represented exactly and do not count.
No single observer wins on every network; this one measures what the others assume.

First order ends where clipping moves a value far: through a closed gate no gradient comes, and a clipped value opens it. So the choice
is proved. On samples spread over the data, the network with these ranges must be at least as near to the float one as with those that
clip nothing, in each output; by halves, the quantizers that break this keep the extremes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.quantize.calibration.agreement import errors, largest_part, run_all
from torchopt.quantize.calibration.batch_slices import Call, kept, spread
from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.corrections.walk import rounding
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.rounding import in_memory_order, order
from torchopt.quantize.observers.histogram import StreamingHistogram
from torchopt.quantize.observers.ranges import mse_range

SAMPLES = 64
PROOF = 128  # samples that the choice is proved on
TRIALS = 24  # of the proof, where it fails
NOISE = 1.01  # times the error with the extremes: below it the two are alike
MOST = 1 << 17  # values of one activation that a pass counts
Ends = tuple[torch.Tensor, torch.Tensor]


def choose_ranges(model: nn.Module, calls: Sequence[Call], seed: int = 0) -> None:
    """Set the range of every quantizer whose observer is "auto"; one that no gradient reaches keeps the range that it has.

    Args:
        model: what `attach` returned, all ranges set to the extremes.
        calls: samples, as the arguments of the model, a few in each so that a backward pass fits into memory.
        seed: of the projections.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer) and m.by_output]
    if not quantizers or not calls:
        return
    chosen = _chosen(model, quantizers, calls, seed)
    if chosen:
        _prove(model, chosen, spread(calls, PROOF))


def _chosen(
    model: nn.Module, quantizers: list[ActivationQuantizer], calls: Sequence[Call], seed: int
) -> dict[ActivationQuantizer, Ends]:
    """The ranges with the least error to first order."""
    seen = {quantizer: StreamingHistogram().to(quantizer.min_val.device) for quantizer in quantizers}
    projection = Projection(seed)
    with rounding(model, enabled=False), folded_once(model.modules()), torch.enable_grad():
        for args, kwargs in kept(calls, SAMPLES):
            for quantizer, x, gradient in _gradients(model, quantizers, args, kwargs, projection):
                _count(seen[quantizer], x, gradient)
    found = {}
    for quantizer, histogram in seen.items():
        if not histogram.empty and bool(torch.isfinite(histogram.counts).all()):
            low, high = mse_range(histogram, quantizer.quant_max - quantizer.quant_min)
            found[quantizer] = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
    return found


@torch.no_grad()
def _prove(model: nn.Module, chosen: dict[ActivationQuantizer, Ends], calls: Sequence[Call]) -> None:
    """Set those of the chosen ranges with which no output is worse than with the extremes, which the others keep."""
    extremes = {quantizer: (quantizer.min_val.clone(), quantizer.max_val.clone()) for quantizer in chosen}
    with rounding(model, enabled=False), folded_once(model.modules()):
        exact = run_all(model, calls)

        def error() -> list[float]:
            return errors(exact, run_all(model, calls))

        for quantizer in chosen:
            quantizer.rounding = True
        plain = error()

        def stands(part: list[ActivationQuantizer]) -> bool:
            _set(extremes | {quantizer: chosen[quantizer] for quantizer in part})
            return all(ours <= NOISE * theirs for ours, theirs in zip(error(), plain, strict=True))

        proved = largest_part(list(chosen), stands, TRIALS)
    _set(extremes | {quantizer: chosen[quantizer] for quantizer in proved})


def _set(ranges: dict[ActivationQuantizer, Ends]) -> None:
    for quantizer, (low, high) in ranges.items():
        quantizer.set_range(low, high)


class Projection:
    """Random projections of the outputs to one number, in which each output has the same weight whatever its scale.

    Args:
        seed: of the numbers drawn.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scales: list[float] = []

    def __call__(self, outputs: Any) -> torch.Tensor | None:
        """Return r·outputs, r ~ N(0, 1), over all tensors that have a gradient; None where none has."""
        answers = [y for y in tree_leaves(outputs) if isinstance(y, torch.Tensor) and y.requires_grad]
        answers = [torch.view_as_real(y) if y.is_complex() else y for y in answers]
        if not answers:
            return None
        if len(self.scales) != len(answers):  # the first call decides, so that all samples count alike
            self.scales = [_scale(y) if len(answers) > 1 else 1.0 for y in answers]
        drawn = (torch.randn(y.shape, generator=self.generator).to(y) for y in answers)
        return torch.stack([(y * r).sum() / scale for y, r, scale in zip(answers, drawn, self.scales, strict=True)]).sum()


def _scale(y: torch.Tensor) -> float:
    """The root mean square of an output; 1 where it is zero or not finite."""
    size = float(y.detach().double().square().mean()) ** 0.5 if y.numel() else 1.0
    return size if 0 < size < math.inf else 1.0


def _gradients(
    model: nn.Module, quantizers: list[ActivationQuantizer], args: Any, kwargs: Any, project: Projection
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
    projection = project(outputs) if reached else None
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
