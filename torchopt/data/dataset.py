"""A data set in memory, and its batches: the order depends only on (seed, epoch), so that a run can be resumed anywhere.

Every random number comes from a generator made of the seed and the place where it is used (epoch, batch), never from a running
state: batch 7 of epoch 3 is the same picture, shifted the same way, whether or not the process was killed before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from torchopt.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Inputs and labels for training and for testing.

    Attributes:
        train_inputs: float32 (N, …).
        train_labels: int64 (N,).
        test_inputs: float32 (M, …).
        test_labels: int64 (M,).
        classes: a name for each label.
        files: a digest of the names and sizes of the files that the data was read from, or "".
        note: how the source was understood, for the user to read, or "".

    Raises:
        DataError: a part is no tensor, empty, not finite, of another type, or inputs and labels differ in number.
    """

    train_inputs: torch.Tensor
    train_labels: torch.Tensor
    test_inputs: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    files: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            inputs, labels = getattr(self, f"{part}_inputs"), getattr(self, f"{part}_labels")
            self._check_types(part, inputs, labels)
            if len(inputs) == 0:
                raise DataError(f"data: the {part} part is empty; at least one sample is needed")
            if len(inputs) != len(labels):
                raise DataError(f"data: the {part} part has {len(inputs)} inputs and {len(labels)} labels; as many are needed")
            if not bool(torch.isfinite(inputs).all()):
                raise DataError(f"data: the {part} inputs hold NaN or infinity; finite numbers are needed")
            low, high, last = int(labels.min()), int(labels.max()), len(self.classes) - 1
            if low < 0 or high > last:
                reach = f"reach {high}" if high > last else f"begin at {low}"
                raise DataError(f"data: the {part} labels {reach}; 0 … {last} are the classes")
        ours, theirs = self.train_inputs, self.test_inputs
        if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
            shapes = f"{tuple(ours.shape[1:])} {ours.dtype} and {tuple(theirs.shape[1:])} {theirs.dtype}"
            raise DataError(f"data: a training sample and a test sample are {shapes}; the same shape and type are needed")

    @staticmethod
    def _check_types(part: str, inputs: object, labels: object) -> None:
        for what, value in (("inputs", inputs), ("labels", labels)):
            if not isinstance(value, torch.Tensor):
                kind = f"{type(value).__module__}.{type(value).__name__}"
                raise DataError(f"data: the {part} {what} are a {kind}; a torch.Tensor is needed, such as torch.from_numpy gives")
            if value.dim() == 0:
                raise DataError(
                    f"data: the {part} {what} are one number; a tensor with the samples along its first axis is needed"
                )
        assert isinstance(labels, torch.Tensor)
        if labels.dim() != 1 or labels.dtype != torch.int64:
            found = f"of shape {tuple(labels.shape)} and {labels.dtype}"
            raise DataError(f"data: the {part} labels are {found}; class numbers are needed, (N,) int64")

    @property
    def example(self) -> torch.Tensor:
        """One test input as a batch, (1, …)."""
        return self.test_inputs[:1]

    def test_batches(self, size: int = 256) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the test part in order, as (inputs, labels)."""
        for start in range(0, len(self.test_inputs), size):
            yield self.test_inputs[start : start + size], self.test_labels[start : start + size]

    def calibration_batches(self, count: int, size: int = 32, seed: int = 0) -> list[torch.Tensor]:
        """Return up to `count` batches of training inputs, drawn without repetition."""
        order = torch.randperm(len(self.train_inputs), generator=generator(seed, 0))[: count * size]
        return [self.train_inputs[part] for part in order.split(size)]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of training pictures, drawn anew for each picture and epoch.

    Attributes:
        shift: move by up to this many pixels each way; the edge is filled with the corner's value.
        flip: mirror left to right in half of the cases.
    """

    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.shift <= 64:
            raise ConfigError(f"Augment.shift: got {self.shift}; 0 to 64 pixels are possible")

    def __call__(self, inputs: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return a changed copy of `inputs` (N, C, H, W)."""
        if inputs.dim() != 4:
            raise DataError(f"Augment: got inputs of shape {tuple(inputs.shape)}; pictures (N, C, H, W) are needed")
        if self.flip:
            mirrored = torch.rand(len(inputs), generator=rng, dtype=torch.float32) < 0.5
            inputs = torch.where(mirrored.to(inputs.device)[:, None, None, None], inputs.flip(-1), inputs)
        return shifted(inputs, self.shift, rng) if self.shift else inputs


def shifted(inputs: torch.Tensor, pixels: int, rng: torch.Generator) -> torch.Tensor:
    """Move each picture of (N, C, H, W) by a random whole number of pixels, |Δ| ≤ `pixels` each way.

    Example:
        >>> moved = shifted(torch.ones(1, 1, 4, 4), 1, generator(0, 1))
        >>> moved.shape
        torch.Size([1, 1, 4, 4])
    """
    n, _, h, w = inputs.shape
    padded = F.pad(inputs, (pixels,) * 4, value=float(inputs.flatten()[0]))  # (N, C, H + 2p, W + 2p)
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, n), generator=rng).to(inputs.device)
    rows = dy[:, None] + torch.arange(h, device=inputs.device)  # (N, H)
    columns = dx[:, None] + torch.arange(w, device=inputs.device)  # (N, W)
    picture = torch.arange(n, device=inputs.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def generator(*place: int) -> torch.Generator:
    """Return a random generator for a place in the run, such as (seed, epoch, batch).

    Example:
        >>> torch.equal(torch.rand(3, generator=generator(0, 5)), torch.rand(3, generator=generator(0, 5)))
        True
    """
    low, high = np.random.SeedSequence(place).generate_state(2)
    return torch.Generator().manual_seed(int(low) + (int(high & 0x7FFFFFFF) << 32))


def epoch_order(count: int, size: int, *, seed: int, epoch: int, ranks: int = 1) -> list[torch.Tensor]:
    """Split a shuffle of `count` samples into batches of `size`; an incomplete last batch is left out unless it is the only one.

    Args:
        count: number of samples.
        size: samples a batch, over all ranks together.
        seed: of the run.
        epoch: its number; with the seed it decides the order.
        ranks: number of processes that will share every batch equally; as many samples of a batch as do not divide are left out.

    Returns:
        Index tensors, int64 (size // ranks * ranks,).

    Raises:
        DataError: no samples, or fewer than ranks.

    Example:
        >>> [len(b) for b in epoch_order(10, 4, seed=0, epoch=0)]
        [4, 4]
        >>> torch.equal(epoch_order(10, 4, seed=0, epoch=3)[1], epoch_order(10, 4, seed=0, epoch=3)[1])
        True
    """
    size = min(size, count)
    if size < ranks:
        raise DataError(f"data: {count} samples in batches of {size} for {ranks} processes; at least one sample each is needed")
    order = torch.randperm(count, generator=generator(seed, epoch))
    whole = order[: count // size * size].reshape(-1, size)
    return [batch[: size // ranks * ranks] for batch in whole]
