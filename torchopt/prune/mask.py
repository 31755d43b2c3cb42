"""The mask on one weight: a `torch.nn.utils.prune` method that multiplies in place, and costs next to nothing.

    ŵ = m ⊙ w

`<param>_orig` is the Parameter, `<param>_mask` a bool buffer of one byte a weight, and `module.<param>` what forward uses: here
the same Parameter, multiplied by its mask in place whenever it has changed (its version counter tells), instead of a product
made anew in each forward pass. That saves the product, its gradient and two allocations of the model's size a step, and sets
the semantics:

- a masked weight is exactly 0 in every forward pass, whatever momentum or weight decay did to it;
- gradients are dense, as in TensorFlow Model Optimization: a masked weight gets its gradient, drifts by one update between two
  passes, and comes back at the next choice of masks if that update lifts it over the threshold (Zhu and Gupta 2017, arXiv
  1710.01878).

Where something stands on `<param>_orig`, it is no leaf. If that keeps zeros (a table of shared values, whose first is 0), its result
over the masked Parameter is used as it is, and the semantics are the same; else the product is taken, and masked weights get no
gradient. Under torch.compile nothing is done in forward; `update` has masked the Parameters after the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import BasePruningMethod

from torchopt.errors import StateError
from torchopt.fast.zero import zero_
from torchopt.network.computed import is_shown
from torchopt.network.weights import Weight, keeps_zeros
from torchopt.prune.config import Prune
from torchopt.prune.score import add_inputs, empty_gathered, gathered_name
from torchopt.state.marks import mark, marked, unmark

FLOOR = "_floor"


@dataclass(frozen=True, kw_only=True, eq=False)
class Coupling:
    """Channels on one axis of a weight that are masked together with those of other weights (`coupled.py`).

    Attributes:
        key: of the group of channels.
        dim: the axis.
        indices: where each channel lies on it, int64 (channels, indices a channel).
        votes: this weight has a say in which channels go.
    """

    key: int
    dim: int
    indices: torch.Tensor
    votes: bool = True


class Mask(BasePruningMethod):
    """The forward pre-hook that keeps one weight masked.

    Args:
        weight: the weight that it stands on.
        config: how its mask is chosen.
        couplings: the groups of channels that it is masked with, for scope "coupled".
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, weight: Weight, config: Prune, couplings: tuple[Coupling, ...] = ()) -> None:
        self.config, self.couplings = config, couplings
        self.weight_name, self.kind, self.out_axis = weight.name, weight.kind, weight.out_axis
        self._tensor_name = weight.param
        self.applied: tuple[int, int, int] | None = None  # which Parameter, at which version, was masked last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "applied": None}  # a copy's Parameter has another version counter

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Make `module.<param>` ready for the forward pass that follows."""
        if self.config.score == "wanda":
            with torch.no_grad():
                add_inputs(module._buffers[f"{self._tensor_name}_inputs"], module, inputs[0])  # type: ignore[arg-type]
        if not self._is_read(module):
            self.publish(module)

    def _is_read(self, module: nn.Module) -> bool:
        """True where a property makes the masked weight ready whenever it is read."""
        return isinstance(module, MaskedProjection) or is_shown(module, self._tensor_name)

    def publish(self, module: nn.Module) -> torch.Tensor:
        """Set `module.<param>` to the masked weight and return it."""
        name = self._tensor_name
        leaf = module._parameters.get(f"{name}_orig")
        if leaf is None or not _is_own_leaf(leaf):
            product = getattr(module, f"{name}_orig") if keeps_zeros(module, f"{name}_orig") else self.apply_mask(module)
            if not self._is_read(module):
                setattr(module, name, product)
            return product
        if not torch.compiler.is_compiling():
            self.multiply_(module, leaf)
            if not isinstance(module, MaskedProjection) and marked(module, name) is not leaf:
                _alias(module, name, leaf)
        return leaf

    def multiply_(self, module: nn.Module, leaf: nn.Parameter) -> None:
        """Zero the masked weights of the Parameter in place, unless it has not changed since the last time.

        Writes through `.data` leave the version alone: in evaluation, where averages of weights are swapped in, the weights are looked at.
        """
        if self.applied != (id(leaf), leaf._version, leaf.data_ptr()) or (not module.training and self._spoilt(module, leaf)):
            zero_(leaf, self.mask(module))
            self.applied = (id(leaf), leaf._version, leaf.data_ptr())

    def _spoilt(self, module: nn.Module, leaf: nn.Parameter) -> bool:
        return bool((leaf.detach().ne(0) & ~self.mask(module)).any())

    def mask(self, module: nn.Module) -> torch.Tensor:
        """Return the mask, bool, of the weight's shape."""
        mask = module._buffers[f"{self._tensor_name}_mask"]
        assert mask is not None
        return mask

    def apply_mask(self, module: nn.Module) -> torch.Tensor:
        """Return `<param>_orig` with +0.0 at the masked places, as a new tensor."""
        value = getattr(module, f"{self._tensor_name}_orig")
        return torch.where(self.mask(module), value, torch.zeros((), dtype=value.dtype, device=value.device))

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        """Part of torch's interface, which calls it when a mask is put on by `apply`; ours are put on by `attach`."""
        raise StateError(f"{self.weight_name}: masks of torchopt are put on by torchopt.prepare(model, rules)")

    def weight(self, module: nn.Module) -> Weight:
        """Return the weight that this mask stands on."""
        module_name = self.weight_name.removesuffix(self._tensor_name).removesuffix(".")
        return Weight(module_name=module_name, module=module, param=self._tensor_name, kind=self.kind, out_axis=self.out_axis)

    def leaf(self, module: nn.Module) -> nn.Parameter:
        """Return the Parameter that the optimizer sees, also under a table."""
        own = module._parameters.get(f"{self._tensor_name}_orig")
        return own if own is not None else self.weight(module).trainable

    def gathered(self, module: nn.Module) -> torch.Tensor | None:
        """Return the data that the score has gathered, or None where it needs none."""
        name = gathered_name(self._tensor_name, self.config)
        return None if name is None else module._buffers[name]

    def remembers(self, module: nn.Module) -> bool:
        """True where zeros were found when the mask was put on: then no masked weight comes back."""
        floor = module._buffers[self._tensor_name + FLOOR]
        assert floor is not None
        return bool(floor)

    def install(self, module: nn.Module, mask: torch.Tensor, *, floor: bool) -> None:
        """Put the mask on: rename the Parameter, in its place among the others, and register buffers and hooks."""
        name = self._tensor_name
        weight = self.weight(module)
        buffers = {f"{name}_mask": mask, name + FLOOR: torch.tensor(floor, device=mask.device)}
        gathered = gathered_name(name, self.config)
        if gathered is not None:
            buffers[gathered] = empty_gathered(weight, self.config)
        leaf = weight.trainable
        _rename(module, name, f"{name}_orig")
        for buffer, tensor in buffers.items():
            module.register_buffer(buffer, tensor)
        if type(module) is NonDynamicallyQuantizableLinear:
            module.__class__ = MaskedProjection
        else:
            _alias(module, name, leaf)
        module.register_forward_pre_hook(self)
        module.register_forward_hook(Release(name), always_call=True)

    def remove(self, module: nn.Module) -> None:
        """Take the mask off, leaving the masked values in the Parameter; `torch.nn.utils.prune.remove` calls this.

        Raises:
            StateError: something else stands on the weight, and must come off first.
        """
        name = self._tensor_name
        leaf = module._parameters.get(f"{name}_orig")
        if not isinstance(leaf, nn.Parameter):
            raise StateError(f"{self.weight_name}: shared values stand under the mask; call torchopt.finalize(model) instead")
        with torch.no_grad():
            leaf.copy_(self.apply_mask(module))
        if isinstance(module, MaskedProjection):
            module.__class__ = NonDynamicallyQuantizableLinear  # type: ignore[assignment]
        unmark(module, name)
        _rename(module, f"{name}_orig", name)
        for buffer in (f"{name}_mask", name + FLOOR, gathered_name(name, self.config)):
            if buffer is not None:
                del module._buffers[buffer]
        for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, Release) and hook.name == name]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)


class Release:
    """The forward hook that lets go of a product's autograd graph, so that the module can be copied between passes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        """Detach `module.<name>` where it is a product and no Parameter."""
        value = marked(module, self.name)
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            setattr(module, self.name, value.detach())


class MaskedProjection(NonDynamicallyQuantizableLinear):
    """The output projection of nn.MultiheadAttention, masked: attention reads its weight without calling it, so no hook runs."""

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The masked weight, made ready when it is read."""
        hook = next(h for h in self._forward_pre_hooks.values() if isinstance(h, Mask))
        return hook.publish(self)


def find_mask(module: nn.Module, param: str) -> Mask | None:
    """Return the mask of torchopt that stands on `module.<param>`, or None."""
    hooks = module._forward_pre_hooks.values()
    return next((h for h in hooks if isinstance(h, Mask) and h._tensor_name == param), None)


def _is_own_leaf(leaf: object) -> bool:
    """True for a Parameter that may be written to; within `torch.func.functional_call` a plain tensor stands in its place."""
    return isinstance(leaf, nn.Parameter) and (torch.compiler.is_compiling() or not leaf.is_inference())


def _alias(module: nn.Module, name: str, leaf: nn.Parameter) -> None:
    """Let `module.<name>` be the Parameter without registering it a second time."""
    mark(module, name, leaf)
    if isinstance(module, nn.RNNBase):  # its forward reads this list
        module._flat_weights[module._flat_weights_names.index(name)] = leaf  # type: ignore[call-overload]


def _rename(module: nn.Module, old: str, new: str) -> None:
    """Rename a Parameter without changing the order of `parameters()`, which optimizers rely on."""
    entries = [(new if key == old else key, value) for key, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(entries)
