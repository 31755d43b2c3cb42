"""Shared values as a `torch.nn.utils.parametrize` parametrization: forward uses a table's entries, both the weights and the table train.

    ŵ = T[c]        ∂L/∂w = ∂L/∂ŵ (straight through)        ∂L/∂T[j] = Σ or mean of ∂L/∂ŵ over the members of j

`original` (the trainable weights) decides only which entry a weight takes; `refresh` finds the codes anew after the optimizer's step. The
codes are one byte a weight, saved with the model. ŵ is rendered once a step into a buffer that the next step reuses: no memory of the
model's size is allocated or touched twice. (TensorFlow Model Optimization and DKM keep an n × k matrix instead.) The members of an entry,
by whose number the mean divides, are counted anew every 16th time: between, they change by less than a hundredth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.cluster.assign import assign_, render_
from torchopt.cluster.blocks import count_by_code, sum_by_code
from torchopt.cluster.config import Cluster
from torchopt.cluster.soft import soft_values
from torchopt.cluster.straight import Gathered, Shared, on_grid
from torchopt.cluster.tables.kmeans import refilled
from torchopt.errors import ModelError
from torchopt.state.checksum import seal

COUNT_EVERY = 16
PROBE = 4096  # codes among which each entry of a table that is well used occurs


class SharedWeights(nn.Module):
    """The parametrization on one weight.

    Args:
        config: how the table trains.
        table: (groups, k) initial values, in the weight's dtype.
        codes: (groups, n / groups) uint8 initial codes.
        shape: of the weight.
        out_axis: the axis of the output channels; groups run along it.
        pinned: entry 0 of each group is 0 and stays 0.
    """

    codes: Tensor
    seal: Tensor
    members: Tensor
    softness: Tensor

    def __init__(self, config: Cluster, table: Tensor, codes: Tensor, shape: torch.Size, *, out_axis: int, pinned: bool) -> None:
        super().__init__()
        self.config, self.out_axis, self.pinned = config, out_axis, pinned
        self.shape = tuple(shape)
        self.table = nn.Parameter(table.clone(), requires_grad=True)
        self.register_buffer("codes", codes)
        self.register_buffer("seal", seal(codes))
        self.register_buffer("members", torch.zeros(table.shape, dtype=torch.int64, device=table.device))
        soft = torch.tensor(config.soft_until, device=table.device) if config.soft_until else None
        self.register_buffer("softness", soft)  # steps left, a whole number: averages leave it alone
        self.rendered: tuple[Tensor, Any, Tensor] | None = None  # ŵ, which codes it is of, which table
        self.scales: Tensor | None = None  # of the weight's rank: ŵ = scale of the channel · T[c], where `hold` was given them
        self.evaluations = 0  # tables that gradients were asked for since the last step

    @property
    def intact(self) -> bool:
        """True while the codes are those that `refresh` has left."""
        return torch.equal(self.seal, seal(self.codes))

    @torch.no_grad()
    def mask_(self, mask: Tensor) -> None:
        """Give masked weights code 0, in place."""
        self.codes.mul_(self.grouped(mask))
        self.seal.copy_(seal(self.codes))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rendered": None, "evaluations": 0}

    def forward(self, original: Tensor) -> Tensor:
        """Return ŵ, of the weight's shape, with gradients to `original` and to the table."""
        if self.soft:
            return soft_values(self, original)
        table = self.values()
        if torch.compiler.is_compiling() or type(self.table) is not nn.Parameter:
            return Gathered.apply(original, table, self.codes, self)  # type: ignore[no-any-return, no-untyped-call]
        return Shared.apply(original, table, self)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def keeps_zeros(self) -> bool:
        """True while each weight that is 0 comes out as exactly 0 (`torchopt.network.weights.keeps_zeros`)."""
        return self.pinned and not self.soft

    @property
    def soft(self) -> bool:
        """True while weights take mixtures of entries."""
        return self.config.soft_until > 0 and bool(self.softness > 0)

    @property
    def temperature(self) -> float:
        """Of the soft assignment, now."""
        return self.config.temperature * int(self.softness) / self.config.soft_until

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
    def refresh(self, original: Tensor) -> None:
        """Give each weight its nearest entry; entries that no weight uses are moved to where they save most.

        Raises:
            ModelError: the table is not finite any more.
        """
        if self.pinned:
            self.table[:, 0] = 0.0
        if not math.isfinite(float(self.table.sum())):
            raise ModelError("holds NaN or infinity after an optimizer step; training has diverged, lower the learning rate")
        weight = self.grouped(original)
        self._assign(weight)
        if self._refill(weight):
            self._assign(weight)
            self.recount()  # else the mean over the new members would divide by none
        self.seal.copy_(seal(self.codes))

    @torch.no_grad()
    def hold(self, table: Tensor, codes: Tensor, scales: Tensor | None = None) -> None:
        """Take a table and codes that were found elsewhere, with a scale for each channel or without, in place; nothing trains after it.

        Args:
            table: (groups, k).
            codes: of the weight's shape.
            scales: of the weight's rank, or None.
        """
        self.table.copy_(table)
        self.codes.copy_(self.grouped(codes))
        self.seal.copy_(seal(self.codes))
        self.scales, self.rendered = scales, None
        self.recount()

    @torch.no_grad()
    def recount(self) -> None:
        """Count the members of each entry."""
        self.members.copy_(self.member_counts())

    def member_counts(self) -> Tensor:
        """How many weights use each entry (groups, k) int64."""
        groups, k = self.table.shape
        if groups == 1:
            return count_by_code(self.codes.view(-1), k).view(1, k)
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
                    render_(torch.empty(self.codes.shape, dtype=table.dtype, device=table.device), table, self.codes)
                )
            else:
                buffer = self._buffer(table)
                render_(buffer.view(1, -1), table, self.codes)
            if self.scales is not None:
                buffer.mul_(self.scales)
            self.rendered = (buffer, self._codes_now(), table.clone())
            self.evaluations += self.training
        return buffer

    def _buffer(self, table: Tensor) -> Tensor:
        """The buffer of the last step, or a new one."""
        buffer = None if self.rendered is None else self.rendered[0]
        if buffer is None or buffer.dtype != table.dtype or buffer.device != table.device:
            return torch.empty(self.shape, dtype=table.dtype, device=table.device)
        return buffer

    def _codes_now(self) -> tuple[int, int, int]:
        """What tells codes apart, also where somebody has written through `.data`, which bypasses the version."""
        return self.codes._version, self.codes.data_ptr(), int(self.seal)

    def table_gradient(self, gradient: Tensor) -> Tensor:
        """Aggregate ∂L/∂ŵ (the weight's shape) over the members of each entry (groups, k)."""
        grouped = self.grouped(gradient)
        groups, k = self.table.shape
        if groups == 1 and gradient.device.type == "cpu":
            total = sum_by_code(self.codes.view(-1), grouped.reshape(-1).detach(), k).view(1, k)
        else:
            total = torch.zeros(groups, k, dtype=torch.float32, device=gradient.device)
            total = total.scatter_add_(1, self.codes.long(), grouped.float())
        return self.aggregated(total).to(gradient.dtype)

    def aggregated(self, total: Tensor) -> Tensor:
        """Turn sums over members (groups, k) into what the configuration asks for; a pinned entry gets none."""
        if self.config.gradient == "mean":
            total = total / self.members.clamp(min=1)
        if self.pinned:
            total = torch.cat((torch.zeros_like(total[:, :1]), total[:, 1:]), 1)
        return total

    def _assign(self, weight: Tensor) -> None:
        """Nearest codes; of a single table, ŵ is rendered in the same pass."""
        table = self.values().detach()
        if len(self.codes) > 1 or self.soft:
            assign_(self.codes, weight, table)
            return
        with torch.inference_mode(False), torch.no_grad():
            buffer = self._buffer(table)
            assign_(self.codes, weight, table, buffer.view(1, -1))
            self.rendered = (buffer, self._codes_now(), table.clone())

    def _refill(self, weight: Tensor) -> bool:
        """Move entries that no weight uses to where they save most (`kmeans.refilled`); True if any moved."""
        k = self.table.shape[1]
        if len(self.codes) == 1 and bool(torch.bincount(self.codes[0, :PROBE], minlength=k).all()):
            return False
        self.recount()
        groups = (self.members == 0).any(1).nonzero().view(-1).tolist()
        return any([self._refill_group(group, weight[group]) for group in groups])  # noqa: C419 - every group

    def _refill_group(self, group: int, weight: Tensor) -> bool:
        entries, order = self.values()[group].detach().double().cpu().sort(stable=True)
        values = refilled(weight.float().cpu().numpy(), entries.numpy(), pin_zero=self.pinned)
        moved = torch.from_numpy(values != entries.numpy())
        self.table[group, order[moved].to(self.table.device)] = torch.from_numpy(values)[moved].to(self.table)
        return bool(moved.any())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes, softness = state_dict.get(prefix + "codes"), state_dict.get(prefix + "softness")
        if codes is not None:
            state_dict.setdefault(prefix + "seal", seal(codes))  # files from before there were seals
        if softness is not None and softness.is_floating_point():  # and those that kept the fraction, also of hard tables
            state_dict[prefix + "softness"] = torch.round(softness * self.config.soft_until).long()
            if self.softness is None:
                del state_dict[prefix + "softness"]
        super()._load_from_state_dict(state_dict, prefix, *args)
