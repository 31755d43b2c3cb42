"""Proof that a network was cut in the right places: it computes what the whole network computes with those channels at zero.

    cut(w)(x) = zeroed(w)(x)

Zeroed means: every removed index of every weight is 0, and what runs over channels (norms, means, softmax) leaves the removed ones
out. Wherever one index was removed before a reshape, a concatenation or a shuffle, and another one behind it, the two differ. What a
fresh network holds at (nearly) zero, such as last layers, layer scales and the norms of residual branches, is given values first, or
it would hide what lies behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from torchopt.prune.channels.call import Call
from torchopt.prune.channels.cut import Removed
from torchopt.prune.channels.rules import NORMS, SOFTMAXES, STATISTICS

TOLERANCE = 1e-4  # of the largest output: float32, summed in another order
TINY = 1e-3  # weights below it are taken for a start at zero
Gone = Mapping[int, np.ndarray]  # for the axes that a statistic runs over, the indices that were removed


class Proof:
    """A whole network and inputs that show what it does.

    Args:
        model: the whole network.
        inputs: the positional arguments of one forward call.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.whole = _lively(model)
        self.inputs = tree_map(_lively_input, inputs)

    def problem(
        self, removed: Removed, statistics: Sequence[Gone], cuts: Sequence[Callable[[nn.Module], nn.Module | None]]
    ) -> tuple[str, int]:
        """Try several ways to cut the network; return what is wrong with the last, or the place of the first that is right.

        Args:
            removed: for each axis of its tensors, what the cut removes.
            statistics: the same for each call of a statistic over channels, in order.
            cuts: make a smaller network out of a whole one, or None where there is nothing to try.

        Returns:
            `("", place)`, or a sentence and -1.
        """
        zeroed = copy.deepcopy(self.whole)
        _zero(zeroed, removed)
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _WithoutRemoved(statistics),
        ):  # as in `trace.py`: the same calls, in order
            expected = [y for y in tree_leaves(zeroed(*self.inputs)) if isinstance(y, torch.Tensor)]
        problem = ""
        for place, make in enumerate(cuts):
            small = make(self.whole)
            if small is None:
                continue
            problem = _problem(small, self.inputs, expected)
            if not problem:
                return "", place
        return problem, -1


def _problem(small: nn.Module, inputs: tuple[Any, ...], expected: Sequence[torch.Tensor]) -> str:
    try:
        with torch.no_grad():
            made = [y for y in tree_leaves(small(*inputs)) if isinstance(y, torch.Tensor)]
    except Exception as error:  # whatever the network's code raises where a size is not what it expects
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"the network does not run without some of them ({lines[0][:200] if lines else type(error).__name__})"
    for mine, theirs in zip(made, expected, strict=True):
        if mine.shape != theirs.shape:
            return f"an output would have the shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
        if mine.is_floating_point() and not _close(mine, theirs):
            return "what is computed from them does not follow when some are removed"
    return ""


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return False
    scale = float(theirs[finite].abs().max()) if bool(finite.any()) else 0.0
    return bool(((mine - theirs)[finite].abs() <= TOLERANCE * scale).all())


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, at least in float32, in which nothing is at zero from the start."""
    twin = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in twin.named_parameters():
        if tensor.numel() == 0 or not tensor.is_floating_point() or float(tensor.abs().max()) >= TINY:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.numel() > max(tensor.shape, default=1):
            value = noise / (tensor[0].numel() ** 0.5)
        else:
            value = 0.1 * noise if name.endswith("bias") else 1.0 + 0.1 * noise
        tensor.copy_(value)
    return twin if any(t.dtype == torch.float64 for t in twin.parameters()) else twin.float()


def _lively_input(x: Any) -> Any:
    """Examples are often zeros or ones, and tell nothing."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.numel() < 2:
        return x
    if bool((x == x.flatten()[0]).all()):
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def _zero(model: nn.Module, removed: Removed) -> None:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for (name, dim), indices in removed.items():
        if name in tensors:
            tensors[name].index_fill_(dim, torch.from_numpy(indices).to(tensors[name].device), 0.0)


class _WithoutRemoved(TorchDispatchMode):
    """Statistics over channels see only those that are left; what comes out for each channel is zero for the others."""

    def __init__(self, statistics: Sequence[Gone]) -> None:
        super().__init__()
        self.waiting = list(statistics)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {}, None)
        if call.name == "_weight_norm_interface":  # a removed row is 0 / 0
            return tuple(part.nan_to_num() for part in func(*args, **(kwargs or {})))
        gone = self.waiting.pop(0) if call.name in STATISTICS and self.waiting else {}
        if not any(len(indices) for indices in gone.values()):
            return func(*args, **(kwargs or {}))
        x = call.tensors[0]
        left = {axis: torch.from_numpy(np.setdiff1d(np.arange(x.shape[axis]), i)).to(x.device) for axis, i in gone.items()}
        if call.name in NORMS:
            result, *others = _norm_of_left(call, left)
            return _spread(result, left, x.shape), *others
        result = func(_picked(x, left), *args[1:], **(kwargs or {}))
        return _spread(result, left, x.shape) if call.name in SOFTMAXES else result


def _norm_of_left(call: Call, left: Mapping[int, torch.Tensor]) -> Any:
    values = dict(call.given)
    layer = call.name == "native_layer_norm"
    first = values["input"].dim() - len(values["normalized_shape"]) if layer else 1
    values["input"] = _picked(values["input"], left)
    for name in ("weight", "bias"):
        if values[name] is not None:
            values[name] = _picked(values[name], {axis - first: indices for axis, indices in left.items()})
    if layer:
        values["normalized_shape"] = list(values["input"].shape[first:])
    else:
        own = values["group"] == values["C"]
        values["C"] = values["input"].shape[1]
        values["group"] = values["C"] if own else values["group"]
    return call.func(*values.values())


def _picked(x: torch.Tensor, left: Mapping[int, torch.Tensor]) -> torch.Tensor:
    for axis, indices in left.items():
        x = x.index_select(axis, indices)
    return x.contiguous()


def _spread(result: torch.Tensor, left: Mapping[int, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    for axis, indices in left.items():
        wide = result.new_zeros([shape[axis] if d == axis else size for d, size in enumerate(result.shape)])
        result = wide.index_copy_(axis, indices, result)
    return result
