"""What a layer reads, as the solver wants it: moments and means, gathered once however many ways of making it small are tried."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from torchopt.solver import means, moments, products


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a layer reads: second moments, those with what it reads in the float network, and both means (of rows by channels only)."""

    h: Tensor
    cross: Tensor
    mean: Tensor | None
    wanted: Tensor | None

    @staticmethod
    def of(layer: nn.Module, inputs: list[Tensor], before: list[Tensor] | None = None) -> Seen:
        """From all its inputs, and from those in the float network where they are others."""
        h = moments(layer, inputs)
        cross = h if before is None else products(layer, before, inputs)
        if getattr(layer, "transposed", False):
            return Seen(h=h, cross=cross, mean=None, wanted=None)
        mean = means(layer, inputs)
        return Seen(h=h, cross=cross, mean=mean, wanted=mean if before is None else means(layer, before))
