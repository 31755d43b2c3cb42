"""Proof that a network was cut in the right places: it computes what the whole network computes with those channels at zero.

    cut(w)(x) = zeroed(w)(x)        in evaluation mode, and in training mode where the network runs so

Zeroed means: every removed index of every weight is 0, and what runs over channels (norms, means, softmax) leaves the removed ones
out. Wherever one index was removed before a reshape, a concatenation or a shuffle, and another one behind it, the two differ. What a
fresh network holds at (nearly) zero, such as last layers, layer scales and the norms of residual branches, is given values first, or
it would hide what lies behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.channels.arguments import Arguments, Examples
from torchopt.channels.cut import Removed
from torchopt.channels.follow.call import Call
from torchopt.channels.follow.outputs import tensors_of
from torchopt.channels.follow.rules import NORMS, SOFTMAXES, STATISTICS, TRAINED_NORMS
from torchopt.channels.proved.fixed import held_still
from torchopt.errors import DataError, ModelError, first_line
from torchopt.network.copies import copied

TOLERANCE = 1e-4  # of the largest output: float32, summed in another order
LOOSE = 1e-2  # in training mode, where batch norm over few values makes roundings larger
FEW = 0.01  # of the whole numbers in an output may differ: a rounding decides between two that are nearly equal
TINY = 1e-3  # weights below it are taken for a start at zero
Gone = Mapping[int, np.ndarray]  # for the axes that a statistic runs over, the indices that were removed


class Proof:
    """A whole network and inputs that show what it does.

    Args:
        model: the whole network.
        inputs: the arguments of one forward call.

    Attributes:
        masked: where given, a cut must equal the network itself, statistics and all, with what is zero in these parameters at zero; in a
            parameter that is not among them, everything that goes.

    Raises:
        DataError: on these inputs the network shows nothing: every output is zero or NaN.
        ModelError: it returns no tensor.
    """

    def __init__(self, model: nn.Module, inputs: Examples | Arguments) -> None:
        given = Arguments.of(model, inputs)
        self.whole = _lively(model)
        self.inputs = _telling(self.whole, [given.mapped(_lively_input), given.mapped(_wide)])
        self.twice = self._for_training()
        self.masked: Mapping[str, torch.Tensor] | None = None

    def problem(
        self,
        removed: Removed,
        statistics: Sequence[Gone],
        cuts: Iterable[Callable[[nn.Module], nn.Module | None]],
        trained: Sequence[Gone] = (),
    ) -> tuple[str, int]:
        """Try several ways to cut the network; return what is wrong with the first, or the place of the first that is right.

        Args:
            removed: for each axis of its tensors, what the cut removes.
            statistics: the same for each call of a statistic over channels, in order.
            cuts: make a smaller network out of a whole one, or None where there is nothing to try.
            trained: `statistics` in training mode.

        Returns:
            `("", place)`, or a sentence and -1.
        """
        zeroed, exact = copied(self.whole), self.masked is not None
        statistics, trained = ((), ()) if exact else (statistics, trained)
        _zero(zeroed, removed, self.masked)
        expected, _ = _answers(zeroed, self.inputs, statistics)
        in_training: list[torch.Tensor] | None = None
        first = ""
        for place, make in enumerate(cuts):
            small = make(self.whole)
            if small is None:
                continue
            problem = _problem(small, self.inputs, expected, TOLERANCE)
            if not problem and self.twice is not None:
                if in_training is None:
                    in_training, left = _answers(zeroed.train(), self.twice, trained)
                    in_training = (
                        in_training if left == 0 or exact else []
                    )  # other statistics than were followed: it can only be run
                problem = _problem(small.train(), self.twice, in_training, LOOSE)
                problem = problem and f"in training mode, {problem}"
            if not problem:
                return "", place
            first = first or problem
        return first, -1

    def _for_training(self) -> Arguments | None:
        """Inputs for training mode; None where the network does not take them so, shrunken or not."""
        twice = self.inputs.mapped(_twice)
        try:
            _answers(copied(self.whole).train(), twice)
        except Exception:  # whatever the network's code raises
            return None
        return twice


def _telling(model: nn.Module, choices: Sequence[Arguments]) -> Arguments:
    """The first inputs on which an output is neither zero nor NaN."""
    for inputs in choices:
        try:
            answers, _ = _answers(model, inputs)
        except Exception:  # whatever the network's code raises where an input is not what it expects
            continue
        if not answers:
            raise ModelError(
                f"shrink: {type(model).__name__} returns no tensor, so that no cut can be proved; return what it computes"
            )
        if any(_tells(answer) for answer in answers):
            return inputs
    raise DataError(
        "shrink: on the example inputs every output of the network is zero or NaN, so that no cut can be proved; give inputs as they "
        "occur"
    )


def _tells(answer: torch.Tensor) -> bool:
    values = answer.abs() if answer.is_complex() else answer.double()
    return bool((values.isfinite() & (values != 0)).any())


def _answers(model: nn.Module, inputs: Arguments, statistics: Sequence[Gone] = ()) -> tuple[list[torch.Tensor], int]:
    """What a network returns, with randomness held still, and by how many statistics it differs from those foreseen."""
    without = _WithoutRemoved(statistics)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), held_still(), without:  # as in `trace.py`: the same calls, in order
        answers = tensors_of(inputs.run(model))
    return answers, without.beyond + len(without.waiting)


def _problem(small: nn.Module, inputs: Arguments, expected: Sequence[torch.Tensor], tolerance: float) -> str:
    """What is wrong with a smaller network; it need only run where nothing is expected."""
    try:
        fused = contextlib.nullcontext() if not small.training else sdpa_kernel(SDPBackend.MATH)  # its dropout is not seen
        with torch.no_grad(), held_still(), fused:
            made = tensors_of(inputs.run(small))
    except Exception as error:  # whatever the network's code raises where a size is not what it expects
        return f"the network does not run without some of them ({first_line(error)[:200]})"
    if not expected:
        return ""
    if len(made) != len(expected):
        return f"the network would return {len(made)} tensors instead of {len(expected)}"
    for mine, theirs in zip(made, expected, strict=True):
        if mine.shape != theirs.shape:
            return f"an output would have the shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
        if not _close(mine, theirs, tolerance):
            return "what is computed from them does not follow when some are removed"
    return ""


def _close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    if not (mine.is_floating_point() or mine.is_complex()):
        return mine.numel() == 0 or float((mine != theirs).double().mean()) <= FEW
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return False
    scale = float(theirs[finite].abs().max()) if bool(finite.any()) else 0.0
    return bool(((mine - theirs)[finite].abs() <= tolerance * scale).all())


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, at least in float32, in which nothing is at zero from the start."""
    twin = copied(model).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in twin.named_parameters():
        if tensor.numel() == 0 or not tensor.is_floating_point() or float(tensor.abs().max()) >= TINY:
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
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
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(x)
    return _wide(x)


def _wide(x: Any) -> Any:
    half = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.float() if half else x


def _twice(x: Any) -> Any:
    """Batch norm in training mode needs more than one value for each channel, and values that differ."""
    if not isinstance(x, torch.Tensor) or not x.dim():
        return x
    return torch.cat([x, 0.7 * x.flip(-1) if x.is_floating_point() else x.flip(-1)])


@torch.no_grad()
def _zero(model: nn.Module, removed: Removed, masked: Mapping[str, torch.Tensor] | None) -> None:
    parameters = dict(model.named_parameters())
    tensors = parameters if masked is not None else parameters | dict(model.named_buffers())
    for (name, dim), indices in removed.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        goes = torch.from_numpy(indices).to(tensor.device)
        if masked is None or name not in masked:
            tensor.index_fill_(dim, goes, 0.0)
        else:
            there = torch.zeros_like(tensor, dtype=torch.bool).index_fill_(dim, goes, True)
            tensor.masked_fill_(there & (masked[name] == 0), 0.0)


class _WithoutRemoved(TorchDispatchMode):
    """Statistics over channels see only those that are left; what comes out for each channel is zero for the others."""

    def __init__(self, statistics: Sequence[Gone]) -> None:
        super().__init__()
        self.waiting, self.beyond = list(statistics), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {}, None)
        if call.name == "_weight_norm_interface":  # a removed row is 0 / 0
            return tuple(part.nan_to_num() for part in func(*args, **(kwargs or {})))
        self.beyond += call.name in STATISTICS and not self.waiting
        gone = self.waiting.pop(0) if call.name in STATISTICS and self.waiting else {}
        if not any(len(indices) for indices in gone.values()):
            return func(*args, **(kwargs or {}))
        x = call.tensors[0]
        left = {axis: torch.from_numpy(np.setdiff1d(np.arange(x.shape[axis]), i)).to(x.device) for axis, i in gone.items()}
        if call.name in NORMS:
            result, *others = _norm_of_left(call, left)
            return _spread(result, left, x.shape), *others
        result = func(_picked(x, left), *args[1:], **(kwargs or {}))
        if call.name in TRAINED_NORMS:
            return _spread(result[0], left, x.shape), *result[1:]
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
