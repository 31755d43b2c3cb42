"""Adaptive rounding: learn for each weight whether it rounds down or up (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

    min_V  ‖ act(x·w) − act(x̂·ŵ) ‖²  +  λ Σ (1 − |2h(V) − 1|^β)        ŵ = s·clamp(⌊w/s⌋ + h(V), −Q, Q)

with h(V) = clamp(1.2·σ(V) − 0.1, 0, 1), β from 20 down to 2, layer by layer: x is what the float network gives the layer, x̂ what the
network gives it whose earlier layers are rounded already, so that a layer also repairs what those did. Weights of exactly zero stay.
What was learned is written into the weight itself, w ← s·q, and the end of its grid kept (`Fused.reach`): rounding to nearest gives
q again, in training and in the baked model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torchopt.network.surgery import batch_norm_affine
from torchopt.quantize.corrections.columns import Columns, columns
from torchopt.quantize.corrections.reach import hold
from torchopt.quantize.corrections.walk import Visit
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.weight_grid import along
from torchopt.solver.positions import PLACES

BATCH = 512  # positions a step; a fourth of it where each channel has its own few weights (depthwise)
STEPS = 500
RATE = 0.03
WARM = 0.2  # of the steps before the regularizer sets in
WEIGHT = 0.02  # λ, in units of the error of rounding to nearest per weight
RIDGE = 0.01
STRETCH = 1.2  # h reaches 0 and 1 at finite V


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One layer in the form of `Columns`: weights in steps of the grid, shape (groups, channels, weights), and what follows."""

    ratio: torch.Tensor  # w / s
    step: torch.Tensor  # s times batch norm's factor, (groups, channels, 1)
    shift: torch.Tensor  # (groups, 1, channels)
    act: nn.Module | None
    qmax: int

    def output(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return act(x·ŵ + b) for columns x (groups, positions, weights)."""
        y = torch.baddbmm(self.shift, x, (codes * self.step).transpose(1, 2))
        return y if self.act is None else self.act(y)

    def error(self, data: Columns, codes: torch.Tensor) -> torch.Tensor:
        """Return the squared error, summed over channels, mean over positions."""
        return (self.output(data.x, codes) - data.y).square().sum() / data.x.shape[1]


def round_adaptively(visit: Visit, seed: int = 0) -> None:
    """Learn the rounding of one layer and write it into its weight, in place."""
    layer = visit.layer
    data = columns(layer, visit.inputs, visit.floats, PLACES, seed)
    weight, scale = layer.weight.detach(), layer.scale(layer.weight.detach())
    problem = _problem(layer, weight, scale)
    nearest = problem.ratio.round().clamp(-problem.qmax, problem.qmax)
    learned = learn(problem, data)
    if problem.error(data, learned) < problem.error(data, nearest):
        hold(layer, learned.reshape(weight.shape), scale)
    else:
        hold(layer, nearest.reshape(weight.shape), scale)


def polish(problem: Problem, data: Columns, codes: torch.Tensor) -> torch.Tensor:
    """Flip, in each row, the code whose flip lowers the squared error before the activation most, until none does.

    With H = E[x̂x̂ᵀ] and g = E[x̂(ŷ − y)], a step of d = ±s on weight k changes the error of its row by 2d·gₖ + d²Hₖₖ. A hundredth of
    H's mean diagonal on it keeps directions that the samples do not show from moving.
    """
    codes, count = codes.clone(), data.x.shape[1]
    h = data.x.transpose(1, 2) @ data.x / count  # (groups, weights, weights)
    ridge = RIDGE * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    h = h + ridge * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    g = (problem.output(data.x, codes) - data.y).transpose(1, 2) @ data.x / count  # (groups, channels, weights)
    g = g + ridge * problem.step * (codes - problem.ratio)
    floor, kept = problem.ratio.floor().clamp(-problem.qmax, problem.qmax), problem.ratio == 0
    top = (floor + 1).clamp(max=problem.qmax)
    group = torch.arange(len(h), device=h.device)[:, None]
    for _ in range(codes.shape[2]):
        d = torch.where(kept, 0.0, torch.where(codes > floor, floor, top) - codes) * problem.step
        gain = 2 * d * g + d.square() * h.diagonal(dim1=1, dim2=2)[:, None]
        best, k = gain.min(2)  # (groups, channels)
        d = torch.where(best < 0, d.gather(2, k[:, :, None]).squeeze(2), 0.0)
        if not bool(d.any()):
            break
        codes.scatter_add_(2, k[:, :, None], (d[:, :, None] / problem.step).round())
        g = g + d[:, :, None] * h[group, k]
    return codes


def _problem(layer: Fused, weight: torch.Tensor, scale: torch.Tensor) -> Problem:
    groups = getattr(layer, "groups", 1)
    channels = len(weight)
    factor = torch.ones(channels, dtype=torch.float32, device=weight.device)
    shift = torch.zeros(channels, dtype=torch.float32, device=weight.device) if layer.bias is None else layer.bias.detach()
    if layer.bn is not None:
        factor, constant = (t.detach() for t in batch_norm_affine(layer.bn))  # type: ignore[arg-type]
        shift = shift * factor + constant
    return Problem(
        ratio=(weight / along(scale, weight.dim(), 0)).reshape(groups, channels // groups, -1),
        step=(scale * factor).reshape(groups, -1, 1),
        shift=shift.reshape(groups, 1, -1),
        act=layer.act,
        qmax=layer.qmax,
    )


def learn(problem: Problem, data: Columns) -> torch.Tensor:
    """Return the learned codes, float integers in the shape of `problem.ratio`."""
    floor, kept = problem.ratio.floor(), problem.ratio == 0
    rest = problem.ratio - floor
    v = nn.Parameter(torch.logit((rest + (STRETCH - 1) / 2) / STRETCH))
    optimizer = torch.optim.Adam([v], lr=RATE, fused=True)
    start = float(problem.error(data, problem.ratio.round().clamp(-problem.qmax, problem.qmax)))
    scale = rest.numel() / max(start, 1e-30)

    def codes(up: torch.Tensor) -> torch.Tensor:
        return torch.where(kept, 0.0, (floor + up).clamp(-problem.qmax, problem.qmax))

    for step, part in enumerate(_parts(data)):
        with torch.enable_grad():
            up = (STRETCH * torch.sigmoid(v) - (STRETCH - 1) / 2).clamp(0, 1)
            loss = problem.error(part, codes(up)) * scale
            progress = (step / STEPS - WARM) / (1 - WARM)
            if progress > 0:
                beta = 2 + 18 * (1 + math.cos(math.pi * progress)) / 2
                loss = loss + WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    learned = codes((v.detach() > 0).float())
    return polish(problem, data, learned) if problem.act is None else learned


def _parts(data: Columns) -> Iterator[Columns]:
    """Yield `STEPS` minibatches, round and round."""
    size = BATCH if len(data.x) == 1 else BATCH // 4
    offset = 0
    for _ in range(STEPS):
        yield Columns(x=data.x[:, offset : offset + size], y=data.y[:, offset : offset + size])
        offset = offset + size if offset + 2 * size <= data.x.shape[1] else 0
