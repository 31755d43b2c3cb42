"""Accuracy: the share of test samples whose largest logit is the label's."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from torchopt.errors import DataError


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the share of right answers, in [0, 1], without changing anything in `model`.

    A copy is evaluated, because observers of a model in quantization-aware training would learn their ranges from the test data.

    Args:
        model: maps inputs (N, …) to logits (N, classes).
        batches: (inputs, labels) pairs.

    Raises:
        DataError: no batches.

    Example:
        >>> accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    judged = copy.deepcopy(model).eval()
    device = next((p.device for p in judged.parameters()), torch.device("cpu"))
    right = total = 0
    for inputs, labels in batches:
        right += int((judged(inputs.to(device)).argmax(1) == labels.to(device)).sum())
        total += len(labels)
    if total == 0:
        raise DataError("accuracy: the data holds no batch; at least one sample is needed")
    return right / total
