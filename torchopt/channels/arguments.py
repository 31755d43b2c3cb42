"""The arguments of one forward call: positional, or by name, whatever structure the network takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from torchopt.errors import DataError
from torchopt.network.batches import model_inputs

Examples = torch.Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What a network is called with.

    Attributes:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, examples: Examples | Arguments) -> Arguments:
        """Read example inputs: a tuple by position, a mapping by name; one tensor alone is a tuple of one.

        Raises:
            DataError: they are none of these.

        Example:
            >>> Arguments.of(nn.Linear(2, 1), {"input": torch.zeros(1, 2)}).run(nn.Linear(2, 1)).shape
            torch.Size([1, 1])
        """
        if isinstance(examples, Arguments):
            return examples
        if isinstance(examples, Mapping):
            return cls(*model_inputs(model, examples))
        if isinstance(examples, torch.Tensor):
            return cls((examples,), {})
        if isinstance(examples, Sequence) and not isinstance(examples, str):
            return cls(tuple(examples), {})
        raise DataError(
            f"shrink: the example inputs are {type(examples).__name__}; a tuple of positional arguments, or a dict of arguments "
            "by name, is needed"
        )

    def run(self, model: nn.Module) -> Any:
        """Call the network once, on copies: some write into their inputs."""
        own = self.mapped(lambda x: x.clone() if isinstance(x, torch.Tensor) else x)
        return model(*own.args, **own.kwargs)

    def mapped(self, change: Callable[[Any], Any]) -> Arguments:
        """Return the arguments with every leaf changed."""
        return Arguments(*tree_map(change, (self.args, self.kwargs)))

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors, in order."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, torch.Tensor)]
