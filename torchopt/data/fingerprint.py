"""What a data set is, in a few kilobytes: enough to see that a resumed run has the samples that it began with.

Sizes, classes, labels, and the names and sizes of files are compared exactly. The inputs themselves are compared through a random
projection of each sample, s_i = x_i·r / √D, summed into at most 4,096 numbers: other pictures give other sums, while the last bits,
which differ between numbers of threads and versions of libraries, do not matter.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from torchopt.data.dataset import Dataset, generator

SUMS = 4096
CLOSE = 0.02  # of a sample's usual size 1: far above rounding, and below what another picture changes
BLOCK = 1024  # samples projected at once
Fingerprint = dict[str, Any]


def fingerprint(data: Dataset) -> Fingerprint:
    """Return what is kept of a data set, as tensors and plain values.

    Example:
        >>> x, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)
        >>> data = Dataset(train_inputs=x, train_labels=y, test_inputs=x, test_labels=y, classes=("a",))
        >>> other = Dataset(train_inputs=x + 1, train_labels=y, test_inputs=x, test_labels=y, classes=("a",))
        >>> changed(fingerprint(data), fingerprint(data)), changed(fingerprint(data), fingerprint(other))
        (None, 'the train inputs')
    """
    found: Fingerprint = {"classes": list(data.classes), "files": data.files}
    for part in ("train", "test"):
        inputs, labels = getattr(data, f"{part}_inputs"), getattr(data, f"{part}_labels")
        found[part] = {
            "shape": list(inputs.shape),
            "labels": hashlib.sha256(labels.cpu().contiguous().numpy().tobytes()).hexdigest(),
            "sums": _sums(inputs),
        }
    return found


def changed(then: Fingerprint, now: Fingerprint) -> str | None:
    """Say in which respect two data sets differ, or None."""
    if then["classes"] != now["classes"]:
        return f"the classes {then['classes'][:5]} are {now['classes'][:5]} now"
    for part in ("train", "test"):
        old, new = then[part], now[part]
        if old["shape"] != new["shape"]:
            return f"the {part} inputs of shape {tuple(old['shape'])} have {tuple(new['shape'])} now"
        if old["labels"] != new["labels"]:
            return f"the {part} labels"
        if not _alike(old["sums"], new["sums"], old["shape"][0]):
            return f"the {part} inputs"
    return "the files' names or sizes" if then["files"] != now["files"] else None


def _sums(inputs: torch.Tensor) -> torch.Tensor:
    """The sums (min(N, 4096),) float64; sample i counts in sum i mod 4096."""
    flat = inputs.cpu().flatten(1) if inputs.dim() > 1 else inputs.cpu()[:, None]  # (N, D)
    size = flat.shape[1]
    direction = torch.randn(size, generator=generator(0, size), dtype=torch.float32) / max(1, size) ** 0.5
    projected = torch.cat([part.float() @ direction for part in flat.split(BLOCK)]).double()  # (N,)
    place = torch.arange(len(projected)) % SUMS
    return torch.zeros(min(SUMS, len(projected)), dtype=torch.float64).index_add_(0, place, projected)


def _alike(then: torch.Tensor, now: torch.Tensor, samples: int) -> bool:
    size = float(then.abs().mean()) / max(1.0, (samples / len(then)) ** 0.5)  # of one sample's projection
    return bool(((then - now).abs() <= CLOSE * max(size, 1e-12)).all())
