"""Where a file on disk first computes something else than the model (`export/first_difference.py`)."""

from __future__ import annotations

import os

from torch import nn

from torchopt.export.first_difference import LayerDifference, differences
from torchopt.network.batches import Batch, model_inputs
from torchopt.onnx_file.read import read
from torchopt.pack.pack import unpack_model
from torchopt.runtime.feed import feed_of_batch


def layer_differences(model: nn.Module, path: str | os.PathLike[str], batch: Batch) -> list[LayerDifference]:
    """Return the difference of each layer that is found in both, in the order in which the file computes them.

    Args:
        model: what was exported.
        path: the file.
        batch: one batch of inputs.

    Raises:
        FileError: the file is missing, damaged, or refused.
    """
    graph = read(path)
    unpack_model(graph, str(path))
    args, kwargs = model_inputs(model, batch)
    return differences(model, graph, args, kwargs, lambda opened: feed_of_batch(model, opened, batch, str(path)), str(path))
