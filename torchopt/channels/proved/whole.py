"""The whole network before anything is cut out of it: what is refused, and the copy that is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from torchopt.channels.arguments import Arguments
from torchopt.channels.layers.attention import adopt
from torchopt.errors import DataError, ModelError, RuleError, StateError, first_line, nearest
from torchopt.network.copies import copied
from torchopt.state.counter import find_state

PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def working_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode, with gradients, in which attention can lose heads.

    Raises:
        StateError: the model carries masks or other things that training needs.
        ModelError: it is wrapped for training in parallel, or a weight has no shape yet, or is not finite.
    """
    _refuse_parallel(model)
    if find_state(model) is not None or torch_prune.is_pruned(model):
        raise StateError("shrink: the model is prepared for training, its weights are masked or shared; finalize it first")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ModelError(f"shrink: {name} has no shape yet; run one batch through the model first")
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"shrink: {name} holds NaN or infinity; its channels cannot be ranked")
    twin = copied(model)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.detach().clone()
    adopt(twin)
    return twin.eval()


def _refuse_parallel(model: nn.Module) -> None:
    """Ranks that each shrink their own would drift apart, and a wrapper's hooks belong to the Parameters of before."""
    for name, module in model.named_modules():
        kind = next((k.__name__ for k in type(module).__mro__ if k.__name__ in PARALLEL), None)
        if kind is not None:
            inner = "the network" if kind == "FSDPModule" else f"{name}.module" if name else "model.module"
            raise ModelError(
                f"shrink: the model is wrapped in {kind}; shrink {inner} in every process before wrapping it, from equal weights"
            )


def ignored_modules(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the modules that a glob matches, and of all that they hold.

    Raises:
        RuleError: a glob matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise RuleError(f"shrink: ignore={pattern!r} matches no module{nearest(pattern, names)}")
        found |= {name for name in names if any(name == m or name.startswith(f"{m}.") for m in matched)}
    return found


def try_inputs(model: nn.Module, inputs: Arguments) -> None:
    """Run the network once.

    Raises:
        DataError: it does not take these inputs.
    """
    try:
        with torch.no_grad():
            inputs.run(model)
    except Exception as error:  # whatever the network's code raises
        by_name = "" if inputs.kwargs or not isinstance(error, TypeError) else "; arguments by name are given as a dict"
        raise DataError(f"shrink: the network does not take the example inputs: {first_line(error)}{by_name}") from error
