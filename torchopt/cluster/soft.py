"""Soft assignment, DKM (Cho et al. 2022, arXiv 2108.12659), on histogram bins instead of an n × k matrix.

    S(w) = Σ_j softmax_j(-(w - T[j])² / τ) · T[j]        τ = temperature · (median gap of the table)²

S is smooth in w, so it is tabulated at 2,048 places between the smallest and the largest weight, and each weight takes the value of
its bin: a (2048, k) matrix in place of DKM's (n, k). Gradient: exact to the table (through the tabulated values), straight through to w.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchopt.cluster.shared import SharedWeights

PLACES = 2048


def soft_values(shared: SharedWeights, original: Tensor) -> Tensor:
    """Return softly shared weights of the shape of `original`."""
    weight = shared.grouped(original.detach())
    table = shared.values()
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    width = ((high - low) / PLACES).clamp(min=torch.finfo(torch.float32).tiny)
    middle = low + width * (torch.arange(PLACES, device=weight.device) + 0.5)  # (groups, PLACES)
    tabulated = soft_table(middle, table, shared.config.temperature)
    bins = ((weight - low) / width).clamp_(0, PLACES - 1).to(torch.int16)
    return _Soft.apply(original, tabulated, bins, shared)  # type: ignore[no-any-return, no-untyped-call]


def soft_table(places: Tensor, table: Tensor, temperature: float) -> Tensor:
    """S at `places` (groups, p) for `table` (groups, k) → (groups, p); differentiable in the table."""
    gaps = table.detach().sort(1).values.diff(dim=1)
    tau = temperature * gaps.median(1, keepdim=True).values.clamp(min=1e-12) ** 2
    distance = (places[:, :, None] - table[:, None, :]) ** 2  # (groups, p, k)
    attention = torch.softmax(-distance / tau[:, :, None], dim=2)
    return (attention * table[:, None, :]).sum(2)


class _Soft(torch.autograd.Function):
    """Gather by bin forward; sum by bin backward."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, tabulated: Tensor, bins: Tensor, shared: SharedWeights) -> Tensor:
        ctx.save_for_backward(bins)
        ctx.shared, ctx.places = shared, tabulated.shape
        return shared.ungrouped(tabulated.gather(1, bins.long())).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (bins,) = ctx.saved_tensors
        grouped = ctx.shared.grouped(gradient)
        total = torch.zeros(ctx.places, dtype=gradient.dtype, device=gradient.device)
        total.scatter_add_(1, bins.long(), grouped)
        return gradient, total, None, None
