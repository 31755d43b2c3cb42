"""Rounding by least squares: what one weight loses by rounding, the weights after it take up (GPTQ, Frantar et al. 2023, arXiv:2210.17323).

    min_q  Σ_o ‖ y_o − x̂·(s_o q_o) ‖²  +  λ ‖ w_o − s_o q_o ‖²          H = x̂ᵀx̂ + λ·1 = LLᵀ,  U = L⁻ᵀ of the inverse

First the real weights that answer best to the rounded inputs x̂, near the trained ones (λ):  w* = w + (y − x̂w) x̂ H⁻¹. That repairs what
the roundings before this layer did to its output. Then one input weight after the other, those that read the strongest inputs first,
is rounded to the grid in all rows at once, and its error is spread over the weights not yet rounded, by the row of U. The cost is
one matrix of (weights of a row)², no training: seconds for a network, against minutes of adaptive rounding.
Weights of exactly zero stay zero: their error is spread like any other.
"""

from __future__ import annotations

import torch

from torchopt.quantize.corrections.adaptive import POSITIONS
from torchopt.quantize.corrections.columns import columns
from torchopt.quantize.corrections.reach import hold
from torchopt.quantize.corrections.walk import Visit
from torchopt.quantize.weight_grid import along
from torchopt.surgery import batch_norm_affine

DAMPING = 0.01  # λ over the mean of the diagonal, in the rounding (the paper's)
TRUST = 0.1  # the same where real weights are fitted: few samples must not move them far


def round_by_least_squares(visit: Visit, seed: int = 0) -> None:
    """Round the weight of one layer and write it in, in place."""
    layer = visit.layer
    data = columns(layer, visit.inputs, visit.floats, POSITIONS, seed, activated=False)
    weight, scale = layer.weight.detach(), layer.scale(layer.weight.detach())
    split = (len(data.x), weight.shape[0] // len(data.x), -1)  # (groups, channels of a group, weights of a row)
    rows = weight.double().reshape(split)
    step = along(scale, weight.dim(), 0).expand_as(weight).double().reshape(split)
    x, y = data.x.double(), _before_norm(visit, data.y.double())
    gram = x.transpose(1, 2) @ x / x.shape[1]
    wanted = _fitted(rows, gram, x, y)
    codes = _rounded(wanted, rows == 0, gram, step, layer.qmax)
    hold(layer, codes.float().reshape(weight.shape), scale)


def _before_norm(visit: Visit, y: torch.Tensor) -> torch.Tensor:
    """What the bare product x·w shall give: the outputs without batch norm and bias; (groups, positions, channels)."""
    layer, groups = visit.layer, len(y)
    if layer.bn is not None:
        factor, shift = (t.detach().double().reshape(groups, 1, -1) for t in batch_norm_affine(layer.bn))  # type: ignore[arg-type]
        y = torch.where(factor == 0, 0.0, (y - shift) / torch.where(factor == 0, 1.0, factor))
    return y if layer.bias is None else y - layer.bias.detach().double().reshape(groups, 1, -1)


def _fitted(rows: torch.Tensor, gram: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return w*, (groups, channels, weights)."""
    missing = (y - x @ rows.transpose(1, 2)).transpose(1, 2) @ x / x.shape[1]
    return rows + torch.linalg.solve(_damped(gram, TRUST), missing, left=False)


def _damped(gram: torch.Tensor, share: float) -> torch.Tensor:
    size = torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    return gram + share * size[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _rounded(wanted: torch.Tensor, zeros: torch.Tensor, gram: torch.Tensor, step: torch.Tensor, qmax: int) -> torch.Tensor:
    """Return the codes, float integers of shape (groups, channels, weights)."""
    order = torch.diagonal(gram, dim1=1, dim2=2).mean(0).argsort(descending=True)
    left, gram = wanted[:, :, order], _damped(gram, DAMPING)[:, order][:, :, order]
    steps, zeros, codes = step[:, :, order], zeros[:, :, order], torch.empty_like(wanted)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    spread = torch.linalg.cholesky(inverse, upper=True)  # U, (groups, weights, weights)
    for k in range(left.shape[2]):
        code = (left[:, :, k] / steps[:, :, k]).round().clamp(-qmax, qmax)
        code = torch.where(zeros[:, :, k], 0.0, code)
        error = (left[:, :, k] - code * steps[:, :, k]) / spread[:, k, k, None]
        left[:, :, k:] -= error[:, :, None] * spread[:, None, k, k:]
        codes[:, :, order[k]] = code
    return codes + 0.0
