"""Compression without training: one call from a trained network to a plain, smaller one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from torchopt import prune as pruning
from torchopt import quantize as quantization
from torchopt.batch_norm import reestimate_batch_norm
from torchopt.batches import Batch, model_inputs
from torchopt.compress import calibrate, finalize, prepare
from torchopt.rules import Rule


def one_shot(
    model: nn.Module,
    rules: Sequence[Rule],
    batches: Iterable[Batch] | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    reestimate: bool = False,
    target: str = "ort-x86",
    progress: bool = True,
) -> nn.Module:
    """Compress without training: masks at their schedules' final sparsity, tables by k-means, scales by calibration.

    Args:
        model: a trained network; it is not touched.
        rules: as for `prepare`.
        batches: data for observers and for batch-norm re-estimation; needed where activations are quantized.
        example_inputs: as for `prepare`.
        reestimate: run `batches` through the pruned or clustered model and renew its batch-norm statistics.
        target: as for `prepare`.
        progress: show progress bars on stderr.

    Returns:
        A plain model.

    Example:
        >>> from torchopt import Cluster
        >>> net = nn.Linear(16, 16)
        >>> small = one_shot(net, [Rule("*", cluster=Cluster(n_clusters=4))])
        >>> len(small.weight.unique())
        4
    """
    ready = prepare(_unfrozen(model), rules, example_inputs, target=target)
    again = pruning.observes(ready) or reestimate  # then the batches are read more than once
    batches = list(batches) if batches is not None and again else batches
    if batches is not None and pruning.observes(ready):
        _run(ready, batches)
    pruning.finish(ready)
    if batches is not None and reestimate:
        reestimate_batch_norm(ready, batches)
    if batches is not None and quantization.observes(ready):
        calibrate(ready, batches, progress=progress)
    return finalize(ready, unfinished=True)  # `finish` has set the final sparsity, ahead of every schedule


def _unfrozen(model: nn.Module) -> nn.Module:
    """A copy whose weights may all change: freezing is about training, and nothing trains in one shot."""
    return copy.deepcopy(model).requires_grad_(True)


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Forward passes in evaluation mode, for what listens to them."""
    training = model.training
    model.eval()
    for batch in batches:
        args, kwargs = model_inputs(model, batch)
        model(*args, **kwargs)
    model.train(training)
