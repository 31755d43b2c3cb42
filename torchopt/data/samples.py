"""Batches that a user gave, how they were understood, and their two halves: one to calibrate on, one to compare on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from torchopt.network.batches import Batch, pieces

SIZE = 32  # samples of a batch where arrays are cut


@dataclass(frozen=True, kw_only=True)
class Given:
    """Batches, and how they were understood.

    Attributes:
        batches: tensors, or dicts by the names of forward's arguments, or what the user's function yielded.
        samples: how many there are.
        told: one line for the user.
    """

    batches: list[Batch]
    samples: int
    told: str

    def halves(self) -> tuple[list[Batch], list[Batch]]:
        """Return every second sample, and the others; both are all of them where there is one alone.

        Example:
            >>> Given(batches=[torch.arange(3)], samples=3, told="").halves()
            ([tensor([0, 2])], [tensor([1])])
        """
        if self.samples < 2:
            return self.batches, self.batches
        found: tuple[list[Batch], list[Batch]] = ([], [])
        seen = 0
        for batch in self.batches:
            size = count(batch)
            for half, part in enumerate(found):
                rows = slice((half - seen) % 2, None, 2)
                if len(range(size)[rows]):
                    part.append(tree_map(lambda x, n=size, r=rows: x[r] if _has(x, n) else x, batch))
            seen += size
        return found


def cut(source: str, values: Any, told: str) -> Given:
    """Return arrays as batches of some samples."""
    return Given(batches=list(pieces(values, SIZE)), samples=count(values), told=f"{source}: {told}")


def count(batch: Any) -> int:
    """Return how many samples a batch holds."""
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.dim()), 1)


def _has(value: Any, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == count
