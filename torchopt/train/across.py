"""Training across processes that takes the steps of one: each rank computes its share of every batch, what spans a batch is shared.

    μ = Σ_r μ_r / R,    σ² = Σ_r (σ_r² + μ_r²) / R - μ²        over R ranks with equal shares

Gradients are averaged by DistributedDataParallel. Batch norm normalizes by the statistics of the whole batch, not of a rank's share
(torch's SyncBatchNorm does so on GPUs only), in the forward pass and in its gradient (Ioffe and Szegedy, 2015, arXiv 1502.03167):

    ∂L/∂x = γ/σ · (g - mean(g) - x̂ · mean(g · x̂)),    both means over the whole batch

What is left between one rank and several is the order of float additions.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def across_ranks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what to call for a training step: `model` itself on one rank, else a wrapper that spans the ranks meanwhile.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> with across_ranks(net) as forward:
        ...     forward is net
        True
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        yield model
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    hooks = [p.register_hook(_strides_of(p)) for p in model.parameters() if p.requires_grad and 1 in p.shape]
    for norm in norms:
        norm.forward = types.MethodType(_normalize, norm)  # type: ignore[method-assign]
    try:
        yield DistributedDataParallel(model)
    finally:
        for norm in norms:
            del norm.forward
        for hook in hooks:
            hook.remove()


def mean_over_ranks(value: float) -> float:
    """Return the mean of a number over the ranks, or the number itself on one rank.

    Example:
        >>> mean_over_ranks(0.5)
        0.5
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _strides_of(parameter: nn.Parameter) -> Any:
    """A hook against DDP's warning: a (O, I, 1, 1) gradient in channels-last layout has other strides, and the same bytes."""
    shape, stride = parameter.shape, parameter.stride()
    return lambda gradient: gradient.as_strided(shape, stride) if gradient.is_contiguous() else gradient


def _normalize(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Batch norm over the ranks: x (N, C, …), of which this rank holds N; running statistics are renewed as torch does."""
    if not norm.training:
        return type(norm).forward(norm, x)
    y, mean, var = _WholeBatch.apply(x, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        count = x.numel() // x.shape[1] * dist.get_world_size()
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype) * count / max(1, count - 1), momentum)
    return y  # type: ignore[no-any-return]


class _WholeBatch(torch.autograd.Function):
    """Normalize by the mean and variance over all ranks; one reduction forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Any:  # type: ignore[override]
        var, mean = torch.var_mean(x.float(), dim=_all_but_channels(x), correction=0)  # (C,)
        both = _reduced(torch.stack([mean.double(), var.double() + mean.double().square()]))
        mean, var = both[0].float(), (both[1] - both[0].square()).clamp(min=0).float()
        ctx.save_for_backward(x, mean, (var + eps).rsqrt(), weight)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, mean, inverse, weight = ctx.saved_tensors
        axes = _all_but_channels(x)
        wide = [1, -1] + [1] * (x.dim() - 2)
        normal = (x.float() - mean.view(wide)) * inverse.view(wide)
        g = gradient.float()
        local = torch.stack([g.sum(axes), (g * normal).sum(axes)])  # (2, C)
        means = _reduced(local / (x.numel() // x.shape[1]))
        slope = inverse if weight is None else inverse * weight.float()
        back = slope.view(wide) * (g - means[0].view(wide) - normal * means[1].view(wide))
        to_weight = None if weight is None else local[1].to(weight.dtype)
        return back.to(x.dtype), to_weight, local[0] if ctx.has_bias else None, None


def _all_but_channels(x: torch.Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _reduced(value: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks."""
    dist.all_reduce(value)
    return value / dist.get_world_size()
