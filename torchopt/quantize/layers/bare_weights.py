"""Weights of modules that have no quantized layer: cells, bags of embeddings, attention without a graph, code of the model's own.

Such a module rounds nothing itself. Its weights are snapped to their grids where they are read while a model runs (`read.py`), and baked
by `finalize`, by the one function here; so the prepared and the finalized model compute the same.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from torchopt.network.marks import marked
from torchopt.network.weights import Weight, weights
from torchopt.quantize.layers.weight_grid import Snap, along, settle, weight_scale

WEIGHTS_LATER = "_torchopt_weights_later"  # on such modules: (configuration, bits, names of custom weights)


def weights_later(module: nn.Module) -> list[Weight]:
    """The weights that `module` itself owns, those of its own kind and the custom ones, to be snapped when it is baked."""
    custom = [Weight(module_name="", module=module, param=param, kind="custom") for param in marked(module, WEIGHTS_LATER)[2]]
    return [w for w in weights(module) if w.module is module] + custom


def snapped(module: nn.Module, weight: Weight, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Return such a weight on its grid, the grid's scale, and the axis along which that runs; None for one scale.

    Args:
        module: with `WEIGHTS_LATER`.
        weight: one of `weights_later(module)`.
        value: what it holds, behind masks and tables.
    """
    config, bits, _ = marked(module, WEIGHTS_LATER)
    most = 2 ** (bits - 1) - 1
    axis = weight.out_axis if config.per_channel and not settle(module, weight.param) else None
    scale = weight_scale(value.detach(), most, axis)
    on_grid = cast(torch.Tensor, Snap.apply(value, along(scale, value.dim(), weight.out_axis), most, False))
    return on_grid + 0.0, scale, axis  # no -0.0: integers know none
