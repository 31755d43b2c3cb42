"""How a loss, or the outputs themselves, depend on each weight: one gradient a sample, for whatever ranks or weighs weights by it.

    g_i = ∂L(f(x_i), y_i) / ∂w        or, without a loss,        g_i = ∂(r·f(x_i)) / ∂w,   r ~ N(0, 1)

Σ g_i² over samples is the diagonal of the empirical Fisher information (k-means weighs by it, Kim et al. 2023, arXiv 2306.07629);
without a loss it is that of JᵀJ, what a change of the weight does to the outputs, and needs no labels (Hutchinson 1990). Σ |w·g_i| is
the first-order Taylor score of pruning (Molchanov et al. 2019, arXiv 1906.10771). Samples are taken one by one: the square of a batch's
mean gradient is not the mean of the squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.errors import ConfigError, DataError
from torchopt.io.progress import track
from torchopt.network.batches import Batch, labels, model_inputs, pieces
from torchopt.network.surgery import evaluating
from torchopt.network.weights import find_weight

SAMPLES = 128  # Kim et al. take 100
Loss = Callable[[Any, Any], torch.Tensor]
Gradients = dict[str, torch.Tensor]


def sample_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    loss: Loss | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
    example_inputs: Sequence[Any] | None = None,
) -> Iterator[Gradients]:
    """Yield the gradients of the first 128 samples, one sample after the other, in evaluation mode; the model stays as it is.

    Args:
        model: a network whose weights of these names require gradients.
        names: of weights, as `torchopt.network.weights` calls them ("features.0.weight").
        batches: tensors, tuples, dicts or (input, label) pairs; samples lie along the first axis.
        loss: `loss(outputs, labels)` → a scalar tensor, for batches of one sample; labels are None where a batch has none. None: a random
            projection of the outputs.
        seed: of the projections.
        progress: show a progress bar on stderr.
        example_inputs: one call's positional arguments, where the model has optional ones: how many entries of a batch are inputs.

    Raises:
        DataError: no batch, or a gradient that is not finite.
        ConfigError: `loss` returns no scalar that depends on the outputs.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [1.0]])
        >>> [g["weight"].tolist() for g in sample_gradients(net, ["weight"], [(x, y)], lambda out, label: (out * label).sum())]
        [[[1.0, 0.0]], [[0.0, 2.0]]]
    """
    found = [(name, weight.trainable) for name in names if (weight := find_weight(model, name)) is not None]
    generator = torch.Generator().manual_seed(seed)
    samples = islice((sample for batch in batches for sample in pieces(batch, 1)), SAMPLES)
    empty = True
    with evaluating(model):
        for sample in track(samples, "gradients", enabled=progress):
            empty = False
            with torch.enable_grad():
                value = _value(model, sample, loss, generator, example_inputs)
                gradients = torch.autograd.grad(value, [weight for _, weight in found], allow_unused=True)
            yield {name: gradient for (name, _), gradient in zip(found, gradients, strict=True) if gradient is not None}
    if empty:
        raise DataError("gradients: the loader gave no batch; give at least one, a hundred samples are plenty")


def _value(
    model: nn.Module, sample: Batch, loss: Loss | None, generator: torch.Generator, example_inputs: Sequence[Any] | None
) -> torch.Tensor:
    """The number to differentiate.

    Raises:
        DataError: it is not finite.
        ConfigError: it is no scalar, or depends on nothing.
    """
    args, kwargs = model_inputs(model, sample, example_inputs)
    outputs = model(*args, **kwargs)
    value = random_projection(outputs, generator) if loss is None else loss(outputs, labels(model, sample, example_inputs))
    if value is None and loss is None:
        raise ConfigError("gradients: no output depends on the weights; give a loss")
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ConfigError(f"loss: returned {got}; one number that depends on the outputs is needed, such as cross_entropy's")
    if not bool(torch.isfinite(value)):
        raise DataError("gradients: the loss of a sample is NaN or infinite; clean the data, or train the model further")
    return value.reshape(())


def random_projection(outputs: Any, generator: torch.Generator) -> torch.Tensor | None:
    """Return r·outputs with r ~ N(0, 1), a scalar, over all tensors of any structure that have a gradient; None where none has.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> random_projection({"y": 3 * x}, torch.Generator().manual_seed(0)).shape, random_projection((), torch.Generator())
        (torch.Size([]), None)
    """
    answers = [y for y in tree_leaves(outputs) if isinstance(y, torch.Tensor) and y.requires_grad]
    if not answers:
        return None
    return torch.stack([(y * torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)).sum() for y in answers]).sum()
