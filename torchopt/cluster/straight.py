"""The gradients of shared values: straight through to the weights, aggregated to the table; and straight through a grid's rounding.

    ∂L/∂w_i = ∂L/∂ŵ_i        ∂L/∂T[j] = Σ or mean of ∂L/∂ŵ_i over the members i of entry j

Bengio, Léonard, Courville (2013), arXiv 1308.3432; the table's part is that of any tensor whose entries are used many times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchopt.cluster.shared import SharedWeights


class Shared(torch.autograd.Function):
    """ŵ from the rendered buffer; gradient straight through to the weights, and aggregated to the table."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, table: Tensor, shared: SharedWeights) -> Tensor:
        """Return ŵ without a copy."""
        ctx.shared = shared
        return shared.render().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return ∂L/∂w and ∂L/∂T."""
        table = ctx.shared.table_gradient(gradient) if ctx.needs_input_grad[1] else None
        return gradient, table, None


class Aggregated(torch.autograd.Function):
    """The table as it is; a gradient that is summed over members becomes what the configuration asks for."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, shared: SharedWeights) -> Tensor:
        """Return the table."""
        ctx.shared = shared
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return ∂L/∂T."""
        return ctx.shared.aggregated(gradient), None


class Gathered(torch.autograd.Function):
    """The same without buffers, in operations that compilers and function transforms trace."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, table: Tensor, codes: Tensor, shared: SharedWeights) -> Tensor:
        """Return ŵ."""
        ctx.shared = shared
        ctx.save_for_backward(codes)
        return shared.ungrouped(table.gather(1, codes.long())).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return ∂L/∂w and ∂L/∂T."""
        (codes,) = ctx.saved_tensors
        shared = ctx.shared
        total = torch.zeros(shared.table.shape, dtype=gradient.dtype, device=gradient.device)
        total = shared.aggregated(total.scatter_add(1, codes.long(), shared.grouped(gradient)))
        return gradient, total, None, None


def on_grid(table: Tensor, bits: int) -> Tensor:
    """Round tables (groups, k) to symmetric integer grids, one scale a group; gradient straight through."""
    scale = grid_scale(table, bits)
    snapped = torch.round(table.detach() / scale) * scale
    return _Snap.apply(table, snapped)  # type: ignore[no-any-return, no-untyped-call]


def grid_scale(table: Tensor, bits: int) -> Tensor:
    """The scale of each group's grid (groups, 1): the largest entry is the largest integer."""
    largest = table.detach().abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), torch.ones_like(largest))


class _Snap(torch.autograd.Function):
    """Exactly the snapped tensor forward, the identity backward (x + (q - x) is not exact)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, snapped: Tensor) -> Tensor:
        return snapped.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
