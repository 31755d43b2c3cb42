"""Which layers make a network's outputs: their channels must all stay, in every head and through every addition and norm.

Found on autograd's graph: from each output tensor backward, through whatever holds no channels of its own, to the first convolution
or linear layer on each way. A network with several heads therefore keeps the outputs of each of them, not only of the layer that
runs last. Modules are known by the `grad_fn` of what they returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Prunable = (nn.modules.conv._ConvNd, nn.Linear)


def output_layers(model: nn.Module, inputs: tuple[Any, ...]) -> list[nn.Module]:
    """Return the prunable layers whose channels reach an output with no other prunable layer between.

    Args:
        model: parameters require gradients; not changed.
        inputs: the positional arguments of one forward call.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2), nn.ReLU())
        >>> output_layers(net, (torch.zeros(1, 4),))
        [Linear(in_features=8, out_features=2, bias=True)]
    """
    made_by: dict[Any, nn.Module] = {}

    def note(layer: nn.Module, _: object, made: object) -> None:
        made_by.update((tensor.grad_fn, layer) for tensor in tensors_in(made) if tensor.grad_fn is not None)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Prunable)]
    try:
        with torch.enable_grad():
            outputs = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return _first_layers([tensor.grad_fn for tensor in tensors_in(outputs)], made_by)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples, dicts and dataclass-like mappings, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _first_layers(waiting: list[Any], made_by: dict[Any, nn.Module]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made_by:
            found[made_by[node]] = None
        else:
            waiting += [before for before, _ in node.next_functions]
    return list(found)
