"""Weights of modules that have no quantized layer: cells, bags of embeddings, attention without a graph, code of the model's own.

Such a module rounds nothing itself. Its weights are snapped to their grids where they are read while a model runs (`read.py`), and baked
by `finalize`, by the one function here; so the prepared and the finalized model compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from torchopt.network.weights import Weight, weights
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.weight_grid import Snap, along, one_scale, weight_scale
from torchopt.state.marks import mark, marked

LATER = "_torchopt_rounded_later"


@dataclass(frozen=True, kw_only=True)
class Later:
    """How such a module's weights are rounded: configuration, bits, and the names of Parameters that no kind of module explains."""

    config: Quantize
    bits: int
    params: tuple[str, ...]


def later(module: nn.Module) -> Later | None:
    """Return what `round_later` was told; None for any other module."""
    found: Later | None = marked(module, LATER)
    return found


def round_later(module: nn.Module, config: Quantize, bits: int, params: Sequence[str]) -> None:
    """Have the weights of a module without a quantized layer rounded, in place, where they are read and by `bake`."""
    mark(module, LATER, Later(config=config, bits=bits, params=tuple(params)))


def weights_later(module: nn.Module) -> list[Weight]:
    """The weights that `module` itself owns, those of its own kind and the custom ones, to be snapped when it is baked."""
    params = marked(module, LATER).params
    custom = [Weight(module_name="", module=module, param=param, kind="custom") for param in params]
    return [w for w in weights(module) if w.module is module] + custom


def snapped(module: nn.Module, weight: Weight, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Return such a weight on its grid, the grid's scale, and the axis along which that runs; None for one scale.

    Args:
        module: of which `later` knows.
        weight: one of `weights_later(module)`.
        value: what it holds, behind masks and tables.
    """
    told = marked(module, LATER)
    most = 2 ** (told.bits - 1) - 1
    axis = weight.out_axis if told.config.per_channel and not one_scale(module, weight.param) else None
    scale = weight_scale(value.detach(), most, axis)
    on_grid = cast(torch.Tensor, Snap.apply(value, along(scale, value.dim(), weight.out_axis), most, False))
    return on_grid + 0.0, scale, axis  # no -0.0: integers know none
