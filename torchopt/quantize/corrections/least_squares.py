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
from torchopt.quantize.corrections.columns import columns
from torchopt.quantize.corrections.reach import hold
from torchopt.quantize.corrections.walk import Visit
from torchopt.quantize.weight_grid import along

DAMPING = 0.01  # λ over the mean of the diagonal (the paper's)


def round_by_least_squares(visit: Visit, seed: int = 0) -> None:
    """Round the weight of one layer and write it in, in place."""
    layer = visit.layer
    data = columns(layer, visit.inputs, visit.floats, POSITIONS, seed)
    weight, scale = layer.weight.detach(), layer.scale(layer.weight.detach())
    split = (len(data.x), len(weight) // len(data.x), -1)  # (groups, channels of a group, weights of a row)
    rows = weight.double().reshape(split)
    step = along(scale, weight.dim(), 0).expand_as(weight).double().reshape(split)
    x = data.x.double()
    codes = _rounded(rows, x.transpose(1, 2) @ x / x.shape[1], step, layer.qmax)
    hold(layer, codes.float().reshape(weight.shape), scale)


def _damped(gram: torch.Tensor) -> torch.Tensor:
    size = torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    return gram + DAMPING * size[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _rounded(rows: torch.Tensor, gram: torch.Tensor, step: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return the codes, float integers of shape (groups, channels, weights)."""
    order = torch.diagonal(gram, dim1=1, dim2=2).mean(0).argsort(descending=True)
    left, gram = rows[:, :, order], _damped(gram)[:, order][:, :, order]
    steps, zeros, codes = step[:, :, order], rows[:, :, order] == 0, torch.empty_like(rows)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    spread = torch.linalg.cholesky(inverse, upper=True)  # U, (groups, weights, weights)
    for k in range(left.shape[2]):
        code = (left[:, :, k] / steps[:, :, k]).round().clamp(-qmax, qmax)
        code = torch.where(zeros[:, :, k], 0.0, code)
        error = (left[:, :, k] - code * steps[:, :, k]) / spread[:, k, k, None]
        left[:, :, k:] -= error[:, :, None] * spread[:, None, k, k:]
        codes[:, :, order[k]] = code
    return codes + 0.0
