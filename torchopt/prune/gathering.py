"""What scores gather between two choices of masks: gradients of each optimizer step, and norms of inputs, the same on all ranks.

A step whose gradients overflowed (float16 under a gradient scaler, which then skips the step) tells nothing about the weights: one
infinite product would outweigh everything after it, so such a step is left out. Inputs differ from rank to rank; their sums of squares
are averaged after each step, so that all ranks choose the same masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from torchopt.prune.mask import Mask
from torchopt.prune.score import GATHERS, add_gradient

Placed = tuple[nn.Module, Mask]


def add_gradients(placed: Sequence[Placed], gradients: Mapping[str, torch.Tensor] | None = None) -> None:
    """Add one step's gradients to the scores that gather them, in place, unless one of them is not finite.

    Args:
        placed: the masks of a model.
        gradients: by weight name; None reads `.grad` of each.

    Raises:
        StateError: a weight has no `.grad`.
    """
    gathering = [(module, mask) for module, mask in placed if mask.config.score in GATHERS]
    found = [(module, mask, _gradient(module, mask, gradients)) for module, mask in gathering]
    for _, mask, gradient in found:
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            warnings.warn(
                f"prune: the gradient of {mask.weight_name} holds NaN or infinity; score={mask.config.score!r} leaves this step out, as "
                "mixed precision does",
                stacklevel=2,
            )
            return
    for module, mask, gradient in found:
        total = mask.gathered(module)
        assert total is not None
        if gradient is not None or gradients is None:
            add_gradient(total, mask.leaf(module), mask.config, mask.weight_name, gradient)


def _gradient(module: nn.Module, mask: Mask, gradients: Mapping[str, torch.Tensor] | None) -> torch.Tensor | None:
    return mask.leaf(module).grad if gradients is None else gradients.get(mask.weight_name)


def share_inputs(placed: Sequence[Placed]) -> None:
    """Average what the ranks of a distributed run have seen of inputs, in place; nothing where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    totals = [total for module, mask in placed if mask.config.score == "wanda" and (total := mask.gathered(module)) is not None]
    if not totals:
        return
    everything = torch.cat(totals)
    dist.all_reduce(everything)
    everything /= dist.get_world_size()
    for total, mean in zip(totals, everything.split([len(total) for total in totals]), strict=True):
        total.copy_(mean)
