"""Batch-norm statistics measured anew: what compression without training shifts, and a few forward passes repair.

    μ = Σ_b n_b·mean_b / N,    σ² = (Σ_b n_b·(var_b + mean_b²) - N·μ²) / (N - 1)

over all values of a channel in all batches, with the batches normalized by their own statistics as in training (Li et al.,
"EagleEye", 2020, arXiv 2007.02491, call it adaptive batch normalization). No weight and no gradient is involved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.errors import DataError, ModelError
from torchopt.network.batches import Batch, each, model_inputs
from torchopt.network.surgery import evaluating
from torchopt.process.ordinary import alone


@alone()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Measure the running mean and variance of every batch norm anew on `batches`, in place.

    Args:
        model: the network; weights, modes and other statistics stay as they are.
        batches: tensors, tuples, dicts or (input, label) pairs.

    Returns:
        How many batch norms were measured.

    Raises:
        ModelError: the model has no batch norm with running statistics.
        DataError: no batch, or values that are not finite; the model keeps its old statistics.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> reestimate_batch_norm(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        1
        >>> round(float(net[0].running_mean), 4), round(float(net[0].running_var), 4)
        (4.0, 6.6667)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ModelError(
            f"reestimate_batch_norm: {type(model).__name__} has no batch norm with running statistics; leave this out"
        )
    sums = {norm: _Moments(norm) for norm in norms}
    handles = [norm.register_forward_pre_hook(sums[norm].see) for norm in norms]
    saved = [(norm, {name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None}) for norm in norms]
    try:
        with evaluating(model):
            _run(model, norms, batches)
    finally:
        for handle in handles:
            handle.remove()
        for norm, buffers in saved:  # the passes in training mode moved them
            for name, buffer in buffers.items():
                norm._buffers[name].copy_(buffer)  # type: ignore[union-attr]
    seen = [(norm, *moments.result()) for norm, moments in sums.items() if moments.count]
    for _, mean, variance in seen:
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise DataError(
                "reestimate_batch_norm: a batch leads to values that are not finite; the statistics are left as they were"
            )
    for norm, mean, variance in seen:
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return len(seen)


class _Moments:
    """Sums over everything but the channels, in float64, of what one batch norm is fed."""

    def __init__(self, norm: nn.Module) -> None:
        self.count = 0
        self.sums = torch.zeros(2, int(norm.num_features), dtype=torch.float64)  # type: ignore[arg-type]

    def see(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        channels = inputs[0].detach().transpose(0, 1).flatten(1).double().cpu() if inputs[0].dim() > 1 else inputs[0][:, None]
        self.count += channels.shape[1]  # (channels, everything else)
        self.sums += torch.stack([channels.sum(dim=1), channels.square().sum(dim=1)])

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.sums[0] / self.count
        variance = (self.sums[1] - self.count * mean.square()).clamp(min=0.0) / max(1, self.count - 1)
        return mean, variance


@torch.no_grad()
def _run(model: nn.Module, norms: list[_BatchNorm], batches: Iterable[Batch]) -> None:
    """Forward passes with the batch norms in training mode; everything else, dropout above all, is in evaluation mode."""
    for norm in norms:
        norm.train()
    empty = True
    for batch in each(batches):
        args, kwargs = model_inputs(model, batch)
        model(*args, **kwargs)
        empty = False
    if empty:
        raise DataError("reestimate_batch_norm: no batch came; give at least one, a hundred images are plenty")
