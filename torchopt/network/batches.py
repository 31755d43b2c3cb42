"""What a batch means: tensors, tuples, dicts, or (input, label) pairs, turned into the arguments of a model's forward.

A pair is ambiguous: (a, b) may be two inputs, or an input and its label. The example inputs that a model was prepared with decide: as
many leading entries are inputs as they were; what is left over is the label. Without them it is the model's `forward`, by the arguments
that it takes without a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from torchopt.errors import DataError
from torchopt.state.counter import find_state

Batch = torch.Tensor | Sequence[Any] | Mapping[str, Any]


def each(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Return what to iterate over: several batches as they are; a single tensor, or a single dict, as one batch.

    Iterating over a tensor would give its rows, and over a dict its keys.

    Raises:
        DataError: it cannot be iterated over.

    Example:
        >>> [batch.shape for batch in each(torch.zeros(4, 3))]
        [torch.Size([4, 3])]
    """
    if isinstance(batches, torch.Tensor | Mapping):
        return [batches]
    if isinstance(batches, str) or not isinstance(batches, Iterable) or hasattr(batches, "__array__"):
        raise DataError(f"batches: got {type(batches).__name__}; batches of tensors, such as a DataLoader or [x], are needed")
    return batches


def arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    """Return example inputs as the tuple of one call's arguments: a single tensor is a call of one.

    Raises:
        DataError: they are neither.

    Example:
        >>> len(arguments(torch.zeros(4, 3)))
        1
    """
    if example_inputs is None or isinstance(example_inputs, torch.Tensor):
        return None if example_inputs is None else (ordinary(example_inputs),)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise DataError(f"example_inputs: got {type(example_inputs).__name__}; a tuple with one call's arguments is needed, (x,)")
    return tuple(ordinary(list(example_inputs)))


def ordinary(value: Any) -> Any:
    """Return a structure with each tensor that was made in inference mode copied to one that may be differentiated."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x, value)


def model_inputs(
    model: nn.Module, batch: Batch, example_inputs: Sequence[Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into the positional and keyword arguments of `model.forward`; labels are dropped.

    Args:
        model: the network that the batch is for.
        batch: a tensor, a tuple or list (inputs, perhaps followed by labels), or a dict of keyword arguments.
        example_inputs: one call's positional arguments; by default those that the model was prepared with.

    Returns:
        `(args, kwargs)` for `model(*args, **kwargs)`.

    Raises:
        DataError: the batch is none of these, or has fewer entries than the model takes.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> args, kwargs = model_inputs(nn.Linear(3, 2), (x, y))
        >>> len(args), kwargs
        (1, {})
    """
    batch = ordinary(batch)
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        accepted = _keyword_names(model)
        return (), {k: v for k, v in batch.items() if accepted is None or k in accepted}
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 0:
        return tuple(batch[: _input_count(model, len(batch), example_inputs)]), {}
    raise DataError(f"batch: got {type(batch).__name__}; a tensor, a non-empty tuple or list, or a dict is needed")


def labels(model: nn.Module, batch: Batch, example_inputs: Sequence[Any] | None = None) -> torch.Tensor | None:
    """Return the label tensor of an (input, label) batch, or None when the batch has inputs only.

    Example:
        >>> labels(nn.Linear(3, 2), (torch.zeros(2, 3), torch.tensor([0, 1]))).tolist()
        [0, 1]
    """
    if isinstance(batch, Mapping):
        found = batch.get("labels")
        return found if isinstance(found, torch.Tensor) else None
    if isinstance(batch, torch.Tensor):
        return None
    count = _input_count(model, len(batch), example_inputs)
    return batch[count] if len(batch) > count else None


def pieces(batch: Any, size: int) -> Iterator[Any]:
    """Cut a batch, of whatever structure, along the first axis into parts of `size` samples.

    The first tensor with an axis says how many samples there are; tensors of another length, and what is no tensor, are in every part.

    Example:
        >>> [(x.tolist(), name) for x, name in pieces((torch.arange(3), "a"), 2)]
        [([0, 1], 'a'), ([2], 'a')]
    """
    count = next((len(x) for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.dim()), 1)
    for start in range(0, count, size):
        yield tree_map(lambda x, at=start: x[at : at + size] if _batched(x, count) else x, batch)


def _batched(value: Any, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == count


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    target = inner if isinstance(inner, nn.Module) and type(model).__name__ != "Sequential" else model
    return list(inspect.signature(target.forward).parameters.values())


def _input_count(model: nn.Module, available: int, example_inputs: Sequence[Any] | None = None) -> int:
    """How many leading entries of a sequence are inputs: those of the example, else required positionals, all of them for `*args`.

    Raises:
        DataError: there are fewer.
    """
    shown = _shown(model) if example_inputs is None else len(example_inputs)
    if shown:
        if available < shown:
            raise DataError(f"batch: has {available} entries; the example inputs that the model was prepared with are {shown}")
        return shown
    parameters = _parameters(model)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return max(1, available - 1)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if available < required:
        raise DataError(f"batch: has {available} entries; {type(model).__name__}.forward takes {required} inputs")
    return max(1, required)


def _shown(model: nn.Module) -> int:
    """How many example inputs the model was prepared with; 0 where that is not known."""
    found = find_state(model)
    return len(found[1].example_inputs or ()) if found is not None else 0


def _keyword_names(model: nn.Module) -> set[str] | None:
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
