"""What the pruners of torchopt share: one axis of one tensor cut, by torch-pruning's pruner of bare parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch_pruning import BasePruningFunc, PrunerBox
from torch_pruning.ops import OPTYPE

Parameters = type(PrunerBox[OPTYPE.PARAMETER])
Own = Mapping[tuple[str, int], np.ndarray]  # parameter or buffer of a module and dimension → indices that go
Step = tuple[BasePruningFunc, str, np.ndarray]  # a pruner, "out" or "in", and what goes there


def gone_from(own: Own, name: str, dim: int) -> np.ndarray:
    """Return what goes from one axis, perhaps nothing."""
    return own.get((name, dim), np.zeros(0, dtype=np.int64))


def cut_tensor(module: nn.Module, name: str, dim: int, indices: Sequence[int]) -> None:
    """Take indices out of a tensor of a module by torch-pruning's pruner of bare parameters."""
    tensor = getattr(module, name, None)
    if tensor is None or not len(indices):
        return
    left = Parameters(pruning_dim=dim).prune_out_channels(tensor, list(indices))
    setattr(module, name, left if isinstance(tensor, nn.Parameter) else left.data)


class Pruner(BasePruningFunc):  # type: ignore[misc]
    """What torch-pruning asks of a pruner besides cutting: how many channels there are; we count them elsewhere."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        raise NotImplementedError

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove inputs, in place."""
        raise NotImplementedError

    def get_out_channels(self, layer: Any) -> int | None:
        """Not told here."""
        return None

    get_in_channels = get_out_channels


class TensorPruner(Pruner):
    """One axis of one tensor of a module that nobody knows."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__(dim)
        self.name = name

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        cut_tensor(layer, self.name, self.pruning_dim, idxs)
        return layer
