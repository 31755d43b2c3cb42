"""Soft assignment, DKM (Cho et al. 2022, arXiv 2108.12659), on histogram bins instead of an n × k matrix.

    S(w) = Σ_j softmax_j(-(w - T[j])² / τ) · T[j]        τ = temperature · (median gap of the table)²

S is smooth in w, so it is tabulated at 2,048 places between the smallest and the largest weight, and each weight takes the value of
its bin: a (2048, k) matrix in place of DKM's (n, k). Gradient: exact to the table (through the tabulated values), divided by its members
where the mean is asked for; straight through to w.
The temperature falls to 0 while training goes on, as batch norms that have seen soft weights only are wrong for hard ones (a network that
is right in 86 % of cases with soft weights may be so in 68 % with hard ones, and in 85 % with batch norm measured anew).
The bins of a single table are found anew in backward, from the weights, which the optimizer has not touched yet: nothing is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.cluster.blocks import block_of, blocks, take_, whole_blocks
from torchopt.cluster.straight import Aggregated
from torchopt.cluster.tables.cells import Cells
from torchopt.fast.buffers import scratch

if TYPE_CHECKING:
    from torchopt.cluster.shared import SharedWeights

PLACES = 2048


def soft_values(shared: SharedWeights, original: Tensor) -> Tensor:
    """Return softly shared weights of the shape of `original`."""
    table = Aggregated.apply(shared.values(), shared)  # type: ignore[no-untyped-call]
    cells = _cells(shared, original.detach())
    if cells is not None:
        tabulated = soft_table(cells.middles().float()[None], table, shared.temperature)[0]
        return _SoftByCells.apply(original, tabulated, cells)  # type: ignore[no-any-return, no-untyped-call]
    weight = shared.grouped(original.detach())
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    width = ((high - low) / PLACES).clamp(min=torch.finfo(torch.float32).tiny)
    middle = low + width * (torch.arange(PLACES, dtype=torch.float32, device=weight.device) + 0.5)  # (groups, PLACES)
    tabulated = soft_table(middle, table, shared.temperature)
    bins = ((weight - low) / width).clamp_(0, PLACES - 1).to(torch.int16)
    return _Soft.apply(original, tabulated, bins, shared)  # type: ignore[no-any-return, no-untyped-call]


def soft_table(places: Tensor, table: Tensor, temperature: float) -> Tensor:
    """S at `places` (groups, p) for `table` (groups, k) → (groups, p); differentiable in the table."""
    gaps = table.detach().sort(1).values.diff(dim=1)
    tau = temperature * gaps.median(1, keepdim=True).values.clamp(min=1e-12) ** 2
    distance = (places[:, :, None] - table[:, None, :]) ** 2  # (groups, p, k)
    attention = torch.softmax(-distance / tau[:, :, None], dim=2)
    return (attention * table[:, None, :]).sum(2)


def _cells(shared: SharedWeights, weight: Tensor) -> Cells | None:
    """The bins of a single table over float32 weights on the CPU; None where they would not do, or where a compiler traces."""
    plain = len(shared.codes) == 1 and weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    if not plain or torch.compiler.is_compiling():
        return None
    low, high = torch.aminmax(weight)
    return Cells.over(float(low), float(high), PLACES)


class _SoftByCells(torch.autograd.Function):
    """Look up by cell forward; sum by cell backward."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, tabulated: Tensor, cells: Cells) -> Tensor:
        ctx.save_for_backward(original)
        ctx.cells = cells
        value = torch.empty_like(original)
        weight, flat, buffer = original.view(-1), value.view(-1), scratch(block_of(original.numel()), dtype=torch.float32)
        whole = whole_blocks(len(weight))
        for part in blocks(whole):
            take_(flat[part], tabulated, cells.of_(buffer[: part.stop - part.start], weight[part]))
        flat[whole:] = tabulated[cells.of_(buffer[: len(weight) - whole], weight[whole:])]
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (original,) = ctx.saved_tensors
        weight, flat, buffer = (
            original.view(-1),
            gradient.float().reshape(-1),
            scratch(block_of(original.numel()), dtype=torch.float32),
        )
        rows, whole = torch.get_num_threads(), whole_blocks(len(weight))
        total = torch.zeros(rows, PLACES, dtype=torch.float32)
        for part in blocks(whole):
            index = ctx.cells.of_(buffer[: part.stop - part.start], weight[part])
            total.scatter_add_(1, index.view(rows, -1), flat[part].view(rows, -1))
        total[0].index_add_(0, ctx.cells.of_(buffer[: len(weight) - whole], weight[whole:]), flat[whole:])
        return gradient, total.sum(0).to(gradient.dtype), None


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
