"""Rounding by least squares: what one weight loses by rounding, the weights after it take up (GPTQ, Frantar et al. 2023, arXiv:2210.17323).

    min_q  Σ_o ‖ x̂·(w_o − s_o q_o) ‖²        H = x̂ᵀx̂ + λ·1,   H⁻¹ = UᵀU

One input weight after the other, those that read the strongest inputs first, is rounded to the grid in all rows at once, and its error
is spread over the weights not yet rounded, by the row of U. What has to sum to nothing, such as the taps of an edge detector, so keeps
its sum. The cost is one matrix of (weights of a row)², and no training: seconds for a network, against minutes of adaptive rounding.
Weights of exactly zero stay zero: their error is spread like any other.
"""

from __future__ import annotations

import torch

from torchopt.quantize.corrections.adaptive import POSITIONS
from torchopt.quantize.corrections.columns import gram
from torchopt.quantize.corrections.reach import hold
from torchopt.quantize.corrections.walk import Visit
from torchopt.quantize.layers.weight_grid import along

DAMPING = 0.01  # λ over the mean of the diagonal (the paper's)
BLOCK = 32  # weights after which those behind are brought up to date, in one product


def round_by_least_squares(visit: Visit, seed: int = 0) -> None:
    """Round the weight of one layer and write it in, in place."""
    layer = visit.layer
    weight, scale = layer.weight.detach(), layer.scale(layer.weight.detach())
    groups = getattr(layer, "groups", 1)
    split = (groups, len(weight) // groups, -1)  # (groups, channels of a group, weights of a row)
    rows = weight.double().reshape(split)
    step = along(scale, weight.dim(), 0).expand_as(weight).double().reshape(split)
    seen = gram(layer, visit.inputs, POSITIONS if groups == 1 else POSITIONS // 4, seed)
    codes = _rounded(rows, seen.double(), step, layer.qmax)
    hold(layer, codes.float().reshape(weight.shape), scale)


def _damped(seen: torch.Tensor) -> torch.Tensor:
    size = torch.diagonal(seen, dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    return seen + DAMPING * size[:, None, None] * torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)


def _rounded(rows: torch.Tensor, seen: torch.Tensor, step: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return the codes, float integers of shape (groups, channels, weights)."""
    order = torch.diagonal(seen, dim1=1, dim2=2).mean(0).argsort(descending=True)
    left, damped = rows[:, :, order], _damped(seen)[:, order][:, :, order]
    steps, zeros, codes = step[:, :, order], rows[:, :, order] == 0, torch.empty_like(rows)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    spread = torch.linalg.cholesky(inverse, upper=True)  # U, (groups, weights, weights)
    count = left.shape[2]
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = torch.empty_like(left[:, :, start:end])
        for k in range(start, end):
            code = (left[:, :, k] / steps[:, :, k]).round().clamp(-qmax, qmax)
            code = torch.where(zeros[:, :, k], 0.0, code)
            error = (left[:, :, k] - code * steps[:, :, k]) / spread[:, k, k, None]
            left[:, :, k:end] -= error[:, :, None] * spread[:, None, k, k:end]
            errors[:, :, k - start] = error
            codes[:, :, order[k]] = code
        left[:, :, end:] -= errors @ spread[:, start:end, end:]
    return codes + 0.0
