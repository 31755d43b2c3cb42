"""The prepared network with rounding off is the float network: proved on the example inputs, and on the first batch of calibration.

    evaluation    the same outputs                                                   else `prepare` or `calibrate` refuse
    training      the same outputs and running statistics from one random state      else the prepared network refuses to train

A graph holds what the code asked of `self.training` and of the data when it was traced. Where that shows, it is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.errors import ModelError
from torchopt.network.other_inputs import in_noise, several
from torchopt.network.proof import Call, Difference, Run, as_it_is, differs, first_difference, run_or_none
from torchopt.quantize.calibration.dropout_rates import Noted, no_dropout, restore_rates
from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.kernels import IntegerKernel
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.read_elsewhere import not_snapped
from torchopt.quantize.layers.recurrent import QuantizedRecurrent


@contextlib.contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Nothing rounds or observes, and batch norms are folded in evaluation, as they will be; the network is as before at the end."""
    with unrounded(model), contextlib.nullcontext() if model.training else folded_once(model.modules()):
        yield


@contextlib.contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Every quantizer, kernel and layer without its rounding, and ranges that follow nothing; as before at the end."""
    parts = [m for m in model.modules() if isinstance(m, Fused | ActivationQuantizer | IntegerKernel | QuantizedRecurrent)]
    before = [(part.rounding, getattr(part, "observing", False), part.aside) for part in parts]
    try:
        for part in parts:
            part.rounding, part.aside = False, True
            if isinstance(part, ActivationQuantizer):
                part.observing = False
        with not_snapped():
            yield
    finally:
        for part, (rounds, observes, aside) in zip(parts, before, strict=True):
            part.rounding, part.aside = rounds, aside
            if isinstance(part, ActivationQuantizer):
                part.observing = observes


class EvaluatesOnly:
    """A hook that refuses a call in training mode, where the prepared network would compute something else than the float one."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Let calls in evaluation mode pass.

        Raises:
            ModelError: the module is in training mode.
        """
        if module.training:
            raise ModelError(self.reason)


class Origin:
    """The float network, and what it gives for some calls: a proof of what was made of it runs it once a call and mode.

    Args:
        network: the float network.
        calls: the arguments.
    """

    def __init__(self, network: nn.Module, calls: Sequence[Call]) -> None:
        self.network, self.calls = network, list(calls)
        self.wanted: list[Run | None] | None = None

    def prove(self, network: nn.Module, step: str) -> None:
        """Compare a network, after a step that rewrote it, in evaluation mode.

        Raises:
            ModelError: they differ.
        """
        if self.wanted is None:
            self.wanted = [run_or_none(self.network, call) for call in self.calls]
        for call, wanted in zip(self.calls, self.wanted, strict=True):
            found = differs(self.network, network, call, under=as_float, wanted=wanted) if wanted is not None else None
            if found is not None:
                raise ModelError(_refusal(self.network, network, call, found, step))

    def prove_training(self, network: nn.Module) -> None:
        """Compare in training mode; a network that is another one there lets nobody train it from now on."""
        for call in () if _evaluates_only(network) else map(several, self.calls):
            noted = Noted()
            found = differs(self.network, network, call, training=True, both=noted, under=as_float)
            restore_rates(self.network, network, noted)
            if found is not None:
                only_evaluates(network, _one_form(self.network, network, call, found))
                return


def examples(example_inputs: tuple[Any, ...]) -> list[Call]:
    """Return the call that the example inputs are, and one of noise where they are constant: zeros say little."""
    call: Call = (example_inputs, {})
    other = in_noise(call)
    same = all(a is b for a, b in zip(tree_leaves(call), tree_leaves(other), strict=True))
    return [call] if same else [call, other]


def only_evaluates(network: nn.Module, reason: str) -> None:
    """Let a network refuse to run in training mode, with this reason."""
    if not _evaluates_only(network):
        network.register_forward_pre_hook(EvaluatesOnly(reason))


def _evaluates_only(network: nn.Module) -> bool:
    return any(isinstance(hook, EvaluatesOnly) for hook in network._forward_pre_hooks.values())


def _refusal(origin: nn.Module, network: nn.Module, call: Call, found: Difference, step: str) -> str:
    return (
        f"quantize: after {step}, {type(origin).__name__} with rounding off is not the float network: "
        f"{found}{_where(origin, network, call)}; leave the layers there out of the rules, or use Quantize(mode='weight_only')"
    )


def _one_form(origin: nn.Module, network: nn.Module, call: Call, found: Difference) -> str:
    return (
        f"quantize: in training mode, {type(origin).__name__} computes something else than the graph of its evaluation "
        f"({found}{_where(origin, network, call, training=True)}), so the prepared network can be calibrated and finalized, and not "
        "trained; put what asks self.training into a submodule that returns one tensor, or use Quantize(mode='weight_only')"
    )


def _where(origin: nn.Module, network: nn.Module, call: Call, *, training: bool = False) -> str:
    both = no_dropout if training else as_it_is
    path = first_difference(origin, network, call, training=training, both=both, under=as_float)
    return f", first in what {path!r} is given" if path else ""
