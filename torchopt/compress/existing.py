"""What an earlier round left in the weights, found again from the values themselves: zeros, and few distinct values.

No marker travels with a model, so this works on anyone's weights: a checkpoint pruned elsewhere keeps its zeros, one clustered
elsewhere keeps its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchopt.network.weights import Weight

SHARED_AT_MOST = 256  # a tensor with more distinct values than a uint8 code can name was never clustered
USES = 1.5  # values count as shared where each is used this often on average; those of weights that were never clustered are all distinct


Left = tuple[int, int]  # zeros, shared values


def left_behind(candidates: Sequence[Weight]) -> dict[str, Left]:
    """What earlier rounds left: {weight name: (number of zeros, number of shared values or 0)}.

    A tensor that is constant is an initialization, not a result. Zero counts as one of the shared values.

    Example:
        >>> from torchopt.network.weights import weights
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> layer.weight.data = torch.tensor([0.0, 0.5]).repeat(32).reshape(8, 8)
        >>> left_behind(weights(layer))
        {'weight': (32, 2)}
    """
    found = {}
    for weight in candidates:
        value = weight.value.detach().flatten()
        used = value[value != 0]
        zeros, distinct = value.numel() - used.numel(), _distinct(used)
        constant = distinct + bool(zeros) <= 1
        shared = distinct + bool(zeros) if distinct + bool(zeros) <= SHARED_AT_MOST and used.numel() >= USES * distinct else 0
        if (zeros or shared) and not constant:
            found[weight.name] = (zeros, shared)
    return found


def _distinct(values: torch.Tensor) -> int:
    """Count the distinct values, giving up early (with a larger count) on tensors that were never clustered."""
    size = 2 * SHARED_AT_MOST
    while size < values.numel():  # some start with a row that repeats few values
        distinct = values[:size].unique().numel()
        if distinct > SHARED_AT_MOST:
            return distinct
        size *= 16
    return values.unique().numel()
