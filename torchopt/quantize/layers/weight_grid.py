"""The integer grid of a weight: its scale, and the rounding that training sees.

    ŵ = s · q        q = clamp(round(w / s), −Q, Q)        Q = 2^(b−1) − 1        s = max|w| / Q   per output channel or per tensor

The grid is symmetric without −2^(b−1), so that −q is on it too: a negative batch-norm factor only flips the signs of the integers.
Where the scale follows the largest weight nothing is clipped, and the straight-through gradient is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchopt.state.marks import mark, marked

ONE_SCALE = "one_scale"  # the buffer that says for which weights of a layer one scale was decided
SHARES = "_torchopt_one_scale"  # the mark that says it without waiting for a GPU: {name of the weight: bool}
SMALLEST_SCALE = 2.0**-60  # a channel of zeros still divides


def weight_scale(w: torch.Tensor, qmax: int, axis: int | None) -> torch.Tensor:
    """Return the scale at which the largest |w| becomes `qmax`.

    Args:
        w: the weight.
        qmax: the largest integer.
        axis: the axis of the output channels, or None for one scale.

    Returns:
        float32, shape (channels,), or () with `axis=None`.

    Example:
        >>> weight_scale(torch.tensor([[1.0, -2.0], [0.5, 0.25]]), 2, 0).tolist()
        [1.0, 0.25]
    """
    w = w.detach()
    if axis is None:
        peak = torch.maximum(w.amax(), -w.amin())
    else:
        rows = w if axis == 0 else w.transpose(0, axis)
        rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
        peak = torch.maximum(rows.amax(1), -rows.amin(1))
    return (peak / qmax).clamp(min=SMALLEST_SCALE)


def along(scale: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """Return a scale of shape (channels,) or () in a shape that multiplies a weight of `rank` dimensions."""
    if scale.dim() == 0:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def products(input_scale: torch.Tensor, weight_scale: torch.Tensor, channels: int) -> torch.Tensor:
    """Return s_x·s_w, the steps in which an integer kernel adds: (channels,), or () where the weight has one scale."""
    step = input_scale * weight_scale
    if step.dim() and len(step) < channels:  # a transposed convolution in groups: each has the same scales
        return step.repeat(channels // len(step))
    return step


class Snap(torch.autograd.Function):
    """ŵ = s·clamp(round(w/s), −Q, Q); the gradient passes where |w| ≤ s·Q."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, scale: torch.Tensor, qmax: int, clips: bool) -> torch.Tensor:
        """Return the snapped weight; `scale` broadcasts; `clips` says that weights may lie outside."""
        q = torch.div(w, scale).round_()
        ctx.clips = clips
        if clips:
            ctx.save_for_backward(q.abs() <= qmax)
            q.clamp_(-qmax, qmax)
        return q.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """Straight through."""
        if ctx.clips:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None


class Codes(torch.autograd.Function):
    """q = clamp(round(w/s), −Q, Q); the gradient is that of w/s inside the grid."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
        """Return float integers."""
        q = torch.div(w, scale).round_()
        ctx.save_for_backward(scale, q.abs() <= qmax)
        return q.clamp_(-qmax, qmax)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """Straight through."""
        scale, inside = ctx.saved_tensors
        return gradient / scale * inside, None, None


def has_scales(module: nn.Module, param: str) -> bool:
    """True where the table on `module.<param>` holds integers, and each output channel has a scale of its own."""
    for name in (param, f"{param}_orig"):
        if parametrize.is_parametrized(module, name):
            return any(getattr(step, "scales", None) is not None for step in module.parametrizations[name])  # type: ignore[index, union-attr]
    return False


def stands_on_table(module: nn.Module, param: str) -> bool:
    """True where one table of shared values for the whole tensor stands on `module.<param>`, masked or not.

    A table per output channel has more than one row, and leaves the scale free to be per channel.
    """
    for name in (param, f"{param}_orig"):
        if parametrize.is_parametrized(module, name):
            for step in module.parametrizations[name]:  # type: ignore[index, union-attr]
                table = getattr(step, "table", None)
                if isinstance(table, torch.Tensor) and (table.dim() < 2 or table.shape[0] == 1):
                    return True
    return False


def one_scale(module: nn.Module, param: str) -> bool:
    """True where a weight has one scale for the whole tensor because its values are shared: as decided, else as it would be now.

    The K values of a table stay K integers only on a grid per tensor: batch norm then gives each channel a scale of its own, and the
    integers stay the same.
    """
    known: bool | None = marked(module, SHARES, {}).get(param)
    return _shares(module, param) if known is None else known


def decide(module: nn.Module, param: str) -> None:
    """Decide on the scale of a weight as it stands now; what training does to its values afterwards changes nothing."""
    take_over(module, {param: _shares(module, param)})


def take_over(module: nn.Module, known: Mapping[str, bool]) -> None:
    """Write decisions down, in the buffer too where the module has one."""
    mark(module, SHARES, {**marked(module, SHARES, {}), **known})
    if ONE_SCALE in module._buffers:
        places = list(module.rounded_params)  # type: ignore[arg-type]
        for param, shares in known.items():
            module.get_buffer(ONE_SCALE)[places.index(param)] = shares


def settled(module: Any, state: dict[str, Any], prefix: str) -> None:
    """Before a checkpoint is loaded: take its decision over, where it holds one (those of earlier versions did not)."""
    theirs = state.setdefault(prefix + ONE_SCALE, module.get_buffer(ONE_SCALE).clone())
    if theirs.numel() == len(module.rounded_params):
        mark(module, SHARES, dict(zip(module.rounded_params, theirs.bool().tolist(), strict=True)))


def _shares(module: nn.Module, param: str) -> bool:
    """True where a table stands on a weight, or a baked one is found in its values: few distinct ones, each used 8 times on average."""
    return (stands_on_table(module, param) or _looks_shared(getattr(module, param))) and not has_scales(module, param)


def _looks_shared(w: torch.Tensor, few: int = 256) -> bool:
    used = w.detach().flatten()
    used = used[used != 0]
    probe = used[: 16 * few].unique()
    count = probe.numel() if probe.numel() > few else used.unique().numel()
    return 1 < count <= few and used.numel() >= 8 * count


def lsq_start(w: torch.Tensor, qmax: int, axis: int | None) -> torch.Tensor:
    """Return where a learned step starts: 2·mean|w| / √Q (Esser et al. 2020, arXiv:1902.08153, §2.1), per channel or ().

    The formula is for few bits. With eight its grid ends at five times the largest weight: no step is wider than that weight needs.

    Example:
        >>> w = torch.tensor([[1.0, -1.0]])
        >>> lsq_start(w, 1, 0), lsq_start(w, 100, 0)
        (tensor([1.]), tensor([0.0100]))
    """
    w = w.detach()
    mean = w.abs().mean() if axis is None else w.abs().transpose(0, axis).flatten(1).mean(1)
    return torch.minimum(2 * mean / qmax**0.5, weight_scale(w, qmax, axis)).clamp(min=SMALLEST_SCALE)


def lsq(w: torch.Tensor, scale: torch.Tensor, qmax: int) -> torch.Tensor:
    """Snap a weight to a grid whose step is trained; the step's gradient is scaled by 1/√(N·Q), N weights a step."""
    damping = (w.numel() / scale.numel() * qmax) ** -0.5
    step = scale * damping + (scale - scale * damping).detach()
    ratio = (w / step).clamp(-qmax, qmax)
    return (ratio + (ratio.round() - ratio).detach()) * step
