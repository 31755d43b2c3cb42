"""Follow the channels through a forward pass: every operator that runs is seen, whatever Python code called it.

A dispatch mode sees the operators below autograd (`aten.convolution`, `aten.view`, …), runs them, and lets `rules.py` say which
identities their results carry. So nothing needs to be traceable: control flow, functional calls, custom modules, shared modules
and tied weights are simply what they do.

Where a reshape splits an axis in two, one of the two must carry the channels: of (heads, head width), the heads if whole heads are
to go. Which one is only known later, when the result becomes a batch of matrix products; then the passes are run again with that
choice. Layers that run in training only (auxiliary classifiers) are seen in a second pass, in training mode.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from torchopt.channels.arguments import Arguments
from torchopt.channels.follow.call import Call
from torchopt.channels.follow.identity import OUTPUT, Axes, Identities, Ids
from torchopt.channels.follow.outputs import tensors_of
from torchopt.channels.follow.rules import STATISTICS, apply_rule
from torchopt.channels.proved.fixed import held_still
from torchopt.network.copies import copied

NORM_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
Place = tuple[bool, str, int]  # a call: in training mode?, the operator, and how many times it has run in this pass
MOST_PASSES = 8  # each settles at least one split; transformers need two


@dataclass
class Seen:
    """What the passes have shown.

    Attributes:
        identities: numbers, pairs, and what must stay.
        tensors: for each floating-point parameter and buffer, by the name of its first place, the numbers of its axes.
        statistics: for each call of one of `STATISTICS` in evaluation mode, in order, the axes of channels that it runs over.
        trained: the same in training mode.
        bare: for each norm module without tensors of its own, the numbers of the axes that it normalizes or keeps apart.
    """

    identities: Identities = field(default_factory=Identities)
    tensors: dict[str, Axes] = field(default_factory=dict)
    statistics: list[dict[int, Ids]] = field(default_factory=list)
    trained: list[dict[int, Ids]] = field(default_factory=list)
    bare: dict[str, Axes] = field(default_factory=dict)


class Trace(TorchDispatchMode):
    """The mode under which a forward pass is followed.

    Args:
        seen: what is added to.
        carriers: for some calls that split an axis, which new axis carries the channels.
    """

    def __init__(self, seen: Seen, carriers: dict[Place, int]) -> None:
        super().__init__()
        self.seen, self.identities = seen, seen.identities
        self.carriers, self.requests = carriers, dict[Place, int]()
        self.axes, self.used = WeakTensorKeyDictionary(), set[int]()
        self.calls, self.shadows = Counter[str](), dict[int, tuple[Place, int]]()
        self.place: Place = (False, "", 0)
        self.modules: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note what its results carry."""
        result = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, result)
        self.calls[call.name] += 1
        self.place = (self.place[0], call.name, self.calls[call.name])
        self.used |= {id(tensor) for tensor in call.tensors}
        if call.name in STATISTICS:
            self.seen.statistics.append({})
        apply_rule(self, call)
        return result

    def of(self, tensor: object) -> Axes | None:
        """Return the identities along the axes of a tensor, or None for a constant, which adapts to whatever it meets."""
        return self.axes.get(tensor) if isinstance(tensor, torch.Tensor) else None  # type: ignore[no-any-return]

    @property
    def where(self) -> str:
        """The module that is running."""
        return self.modules[-1] if self.modules and self.modules[-1] else "the network"

    def start(self, *, training: bool) -> None:
        """Count the calls anew: a pass in evaluation mode, or in training mode."""
        self.calls.clear()
        self.place = (training, "", 0)

    def carrier(self, usual: int, possible: Sequence[int]) -> int:
        """Which axis carries the channels of the split that the present call makes; in training mode as in evaluation."""
        asked = self.carriers.get(self.place, self.carriers.get((False, *self.place[1:]), usual))
        return asked if asked in possible else usual

    def new_shadow(self, axis: int, length: int) -> Ids:
        """Return numbers for an axis of the present call's result that could have carried the channels of a split."""
        first = len(self.shadows) + 1
        self.shadows.update({-n: (self.place, axis) for n in range(first, first + length)})
        return -np.arange(first, first + length, dtype=np.int64)

    def prefer(self, ids: Ids) -> None:
        """Ask that the axis with these shadows carries the channels of its split, when the passes are run again."""
        place, axis = self.shadows[int(ids.min())]
        if place not in self.carriers:
            self.requests.setdefault(place, axis)


def follow(model: nn.Module, inputs: Arguments) -> Seen:
    """Run `model` on `inputs` and return which indices of its weights belong together.

    Args:
        model: it is not changed.
        inputs: the arguments of one forward call.
    """
    carriers: dict[Place, int] = {}
    for _ in range(MOST_PASSES):
        trace = Trace(Seen(), carriers)
        twin = copied(model).eval()
        trained = _passes(twin, inputs, trace)
        if not trace.requests:
            break
        carriers = carriers | trace.requests
    if not trained:  # what it computes is known; what its statistics see is not
        known = len(trace.identities.pairs), len(trace.identities.fixed)
        _in_training(twin, inputs, trace)
        del trace.identities.pairs[known[0] :], trace.identities.fixed[known[1] :]
    return trace.seen


def _passes(model: nn.Module, inputs: Arguments, trace: Trace) -> bool:
    """Evaluation, and training too where some layers are for that only; return whether they are."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in named.items():
        if tensor.is_floating_point() and tensor.dim():
            kernel = _kernel(model, name, tensor)
            axes: Axes = [
                trace.identities.fresh(size) if size > 1 and dim not in kernel else None for dim, size in enumerate(tensor.shape)
            ]
            trace.axes[tensor] = trace.seen.tensors[name] = axes
    _listen(model, trace)
    _run(model, inputs, trace)
    if all(id(p) in trace.used for p in model.parameters()):
        return False
    _in_training(model, inputs, trace)
    return True


def _in_training(model: nn.Module, inputs: Arguments, trace: Trace) -> None:
    statistics = list(trace.seen.statistics)
    trace.seen.statistics[:] = []
    trace.start(training=True)
    with contextlib.suppress(Exception):  # the network cannot be trained with this input, shrunken or not
        _run(model.train(), inputs.mapped(_twice), trace)
    trace.seen.trained[:] = trace.seen.statistics
    trace.seen.statistics[:] = statistics


def _kernel(model: nn.Module, name: str, tensor: torch.Tensor) -> range:
    """The axes of a convolution's weight, also of a computed one, along which its kernel extends, and no channels run."""
    module = model.get_submodule(name.rpartition(".")[0].partition(".parametrizations.")[0])
    return range(2, tensor.dim()) if isinstance(module, _ConvNd) and tensor.dim() == module.weight.dim() else range(0)


def _run(model: nn.Module, inputs: Arguments, trace: Trace) -> None:
    own = inputs.mapped(lambda x: x.clone() if isinstance(x, torch.Tensor) else x)  # some networks write into their inputs
    for x in own.tensors():
        trace.axes[x] = [None] * x.dim()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), held_still(), trace:
        outputs = model(*own.args, **own.kwargs)
    for y in tensors_of(outputs):
        for ids in trace.of(y) or ():
            trace.identities.fix(ids, OUTPUT)


def _twice(x: Any) -> Any:
    """Batch norm in training mode needs more than one value for each channel."""
    return torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x


def _listen(model: nn.Module, trace: Trace) -> None:
    """Know which module runs, see the channels of norms that have no tensors, and let recurrent layers run step by step."""
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(_enter, trace, name))
        module.register_forward_hook(partial(_leave, trace), always_call=True)
        if isinstance(module, nn.RNNBase):
            module.forward = step_by_step(module.forward)  # type: ignore[method-assign]


def _enter(trace: Trace, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    trace.modules.append(name)
    if isinstance(module, NORM_MODULES) and inputs and not [*module.parameters(False), *module.buffers(False)]:
        axes = trace.of(inputs[0]) or [None] * inputs[0].dim()
        layer = isinstance(module, nn.LayerNorm | nn.RMSNorm)
        trace.seen.bare[name] = axes[-len(module.normalized_shape) :] if layer else axes[1:2]  # type: ignore[arg-type]


def _leave(trace: Trace, module: nn.Module, inputs: object, outputs: object) -> None:
    trace.modules.pop()


def step_by_step(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the forward of a recurrent layer run as products, sums and gates, and not as one fused operator."""

    def stepping(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about accelerators that are not there
            with torch.backends.mkldnn.flags(enabled=False):
                return forward(*args, **kwargs)

    return stepping
