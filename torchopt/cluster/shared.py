"""Shared values as a `torch.nn.utils.parametrize` parametrization: forward uses a table's entries, both the weights and the table train.

    ŵ = T[c]        ∂L/∂w = ∂L/∂ŵ (straight through)        ∂L/∂T[j] = Σ or mean of ∂L/∂ŵ over the members of j

`original` (the trainable weights) decides only which entry a weight takes; `refresh` finds the codes anew after the optimizer's step. The
codes are one byte a weight, saved with the model. ŵ is rendered once a step into a buffer that the next step reuses: no memory of the
model's size is allocated or touched twice. (TensorFlow Model Optimization and DKM keep an n × k matrix instead.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchopt.cluster.assign import assign_, look_up_
from torchopt.cluster.config import Cluster
from torchopt.cluster.pieces import PIECE, in_pieces
from torchopt.cluster.soft import soft_values


class SharedWeights(nn.Module):
    """The parametrization on one weight.

    Args:
        config: how the table trains.
        table: (groups, k) initial values, in the weight's dtype.
        codes: (groups, n / groups) uint8 initial codes.
        shape: of the weight.
        out_axis: the axis of the output channels; groups run along it.
        pinned: entry 0 of each group is 0 and stays 0.
        place: of the weight among its module's parameters.
    """

    codes: Tensor
    counts: Tensor

    def __init__(
        self, config: Cluster, table: Tensor, codes: Tensor, shape: torch.Size, *, out_axis: int, pinned: bool, place: int
    ) -> None:
        super().__init__()
        self.config, self.out_axis, self.pinned, self.place = config, out_axis, pinned, place
        self.shape = tuple(shape)
        self.table = nn.Parameter(table.clone(), requires_grad=True)
        self.register_buffer("codes", codes)
        self.rendered: tuple[Tensor, Any, Tensor] | None = None  # ŵ, which codes it is of, which table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rendered": None}

    def forward(self, original: Tensor) -> Tensor:
        """Return ŵ, of the weight's shape, with gradients to `original` and to the table."""
        if self.config.soft and self.training:
            return soft_values(self, original)
        table = self.values()
        if torch.compiler.is_compiling() or type(self.table) is not nn.Parameter:
            return _Gather.apply(original, table, self.codes, self)  # type: ignore[no-any-return, no-untyped-call]
        return _Shared.apply(original, table, self)  # type: ignore[no-any-return, no-untyped-call]

    def values(self) -> Tensor:
        """The table as forward uses it (groups, k): on its integer grid where the configuration asks for one."""
        return self.table if self.config.table_bits is None else on_grid(self.table, self.config.table_bits)

    def grouped(self, weight: Tensor) -> Tensor:
        """View or copy a tensor of the weight's shape as (groups, n / groups)."""
        if len(self.codes) > 1 and self.out_axis:
            weight = weight.movedim(self.out_axis, 0)
        return weight.reshape(self.codes.shape)

    def ungrouped(self, grouped: Tensor) -> Tensor:
        """The inverse of `grouped`."""
        if len(self.codes) > 1 and self.out_axis:
            moved = torch.empty(self.shape, device="meta").movedim(self.out_axis, 0).shape
            return grouped.reshape(moved).movedim(0, self.out_axis)
        return grouped.reshape(self.shape)

    @torch.no_grad()
    def refresh(self, original: Tensor, mask: Tensor | None) -> None:
        """Give each weight its nearest entry; masked weights get entry 0, and entries without members start again."""
        if self.pinned:
            self.table[:, 0] = 0.0
        weight = self.grouped(original)
        kept = None if mask is None else self.grouped(mask)
        self._assign(weight, kept)
        if self._reseed(weight, kept):
            self._assign(weight, kept)

    def member_counts(self) -> Tensor:
        """How many weights use each entry (groups, k) int64."""
        groups, k = self.table.shape
        if groups == 1:
            return _count(self.codes.view(-1), k).view(1, k)
        return torch.zeros(groups, k, dtype=torch.int64, device=self.codes.device).scatter_add_(
            1, self.codes.long(), torch.ones((), dtype=torch.int64, device=self.codes.device).expand(self.codes.shape)
        )

    def render(self) -> Tensor:
        """Return ŵ (the weight's shape, no gradient), from the buffer where neither codes nor table have changed."""
        table = self.values().detach()
        if self.rendered is not None:
            value, codes_then, table_then = self.rendered
            if codes_then == self._codes_now() and table_then.dtype == table.dtype and torch.equal(table_then, table):
                return value
        with torch.inference_mode(False), torch.no_grad():
            if len(self.codes) > 1:
                buffer = self.ungrouped(
                    look_up_(torch.empty(self.codes.shape, dtype=table.dtype, device=table.device), table, self.codes)
                )
            else:
                buffer = self._buffer(table)
                look_up_(buffer.view(1, -1), table, self.codes)
            self.rendered = (buffer, self._codes_now(), table.clone())
        return buffer

    def _buffer(self, table: Tensor) -> Tensor:
        """The buffer of the last step, or a new one."""
        buffer = None if self.rendered is None else self.rendered[0]
        if buffer is None or buffer.dtype != table.dtype or buffer.device != table.device:
            return torch.empty(self.shape, dtype=table.dtype, device=table.device)
        return buffer

    def _codes_now(self) -> tuple[int, int]:
        return self.codes._version, self.codes.data_ptr()

    def table_gradient(self, gradient: Tensor) -> Tensor:
        """Aggregate ∂L/∂ŵ (the weight's shape) over the members of each entry (groups, k)."""
        grouped = self.grouped(gradient)
        groups, k = self.table.shape
        if groups == 1 and gradient.device.type == "cpu":
            total = _sum_by_code(self.codes.view(-1), grouped.view(-1), k).view(1, k)
        else:
            total = torch.zeros(groups, k, dtype=torch.float32, device=gradient.device)
            total = total.scatter_add_(1, self.codes.long(), grouped.float())
        return self.aggregated(total).to(gradient.dtype)

    def aggregated(self, total: Tensor) -> Tensor:
        """Turn sums over members (groups, k) into what the configuration asks for; a pinned entry gets none."""
        if self.config.gradient == "mean":
            total = total / self.member_counts().clamp_(min=1)
        if self.pinned:
            total = total.clone()
            total[:, 0] = 0.0
        return total

    def _assign(self, weight: Tensor, kept: Tensor | None) -> None:
        """Nearest codes; where neither masks nor groups stand in the way, ŵ is rendered in the same pass."""
        table = self.values().detach()
        if kept is None and len(self.codes) == 1:
            with torch.inference_mode(False), torch.no_grad():
                buffer = self._buffer(table)
                assign_(self.codes, weight, table, buffer.view(1, -1))
                self.rendered = (buffer, self._codes_now(), table.clone())
            return
        assign_(self.codes, weight, table)
        if kept is not None:
            self.codes.mul_(kept.view(torch.uint8) if kept.dtype == torch.bool else kept.to(torch.uint8))

    def _reseed(self, weight: Tensor, kept: Tensor | None) -> bool:
        """Move entries that no weight uses to the weights farthest from their own entries; True if any moved."""
        k = self.table.shape[1]
        if len(self.codes) == 1 and int((_count(self.codes.view(-1)[:4096], k) > 0).sum()) == k:
            return False
        counts = self.member_counts()
        moved = False
        for group in (counts == 0).any(1).nonzero().view(-1).tolist():
            moved |= self._reseed_group(group, counts[group], weight[group], None if kept is None else kept[group])
        return moved

    def _reseed_group(self, group: int, counts: Tensor, weight: Tensor, kept: Tensor | None) -> bool:
        table = self.table[group]
        away = (weight - self.values()[group][self.codes[group].long()]).abs()
        if kept is not None:
            away = away * kept
        moved = False
        for entry in (counts == 0).nonzero().view(-1).tolist():
            farthest = int(away.argmax())
            if (self.pinned and entry == 0) or not away[farthest] > 0:
                continue
            table[entry] = weight[farthest]
            away = torch.minimum(away, (weight - weight[farthest]).abs())
            moved = True
        return moved


class _Shared(torch.autograd.Function):
    """ŵ from the rendered buffer; gradient straight through to the weights, and aggregated to the table."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, table: Tensor, shared: SharedWeights) -> Tensor:
        ctx.shared = shared
        return shared.render().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        table = ctx.shared.table_gradient(gradient) if ctx.needs_input_grad[1] else None
        return gradient, table, None


class _Gather(torch.autograd.Function):
    """The same without buffers, in operations that compilers and function transforms trace."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, table: Tensor, codes: Tensor, shared: SharedWeights) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(codes)
        return shared.ungrouped(table.gather(1, codes.long())).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (codes,) = ctx.saved_tensors
        shared = ctx.shared
        index = codes.long()
        grouped = shared.grouped(gradient)
        total = torch.zeros(shared.table.shape, dtype=gradient.dtype, device=gradient.device).scatter_add(1, index, grouped)
        if shared.config.gradient == "mean":
            counts = torch.zeros_like(total).scatter_add(1, index, torch.ones_like(grouped))
            total = total / counts.clamp(min=1)
        if shared.pinned:
            total = torch.cat((torch.zeros_like(total[:, :1]), total[:, 1:]), 1)
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


def _sum_by_code(codes: Tensor, gradient: Tensor, k: int) -> Tensor:
    """Σ gradient by code (k,) float32; in pieces, whose float32 sums are added in float64."""
    gradient = gradient.detach().float()

    def work(begins: range) -> Tensor:
        total = torch.zeros(k, dtype=torch.float64)
        for begin in begins:
            total += torch.bincount(codes[begin : begin + PIECE], gradient[begin : begin + PIECE], minlength=k)
        return total

    return torch.stack(in_pieces(len(codes), work)).sum(0).float()


def _count(codes: Tensor, k: int) -> Tensor:
    """How often each code occurs (k,) int64; two codes are counted at a time."""
    if codes.device.type != "cpu" or k > 128 or len(codes) % 2 or codes.storage_offset() % 2:
        return torch.bincount(codes, minlength=k)
    pairs = torch.bincount(codes.view(torch.int16), minlength=1 << 15).view(128, 256)
    return pairs.sum(0)[:k] + torch.nn.functional.pad(pairs.sum(1), (0, 128))[:k]
