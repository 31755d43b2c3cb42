"""Weights that are computed whenever they are read, by properties on the class of one module, as torch's parametrizations are.

A table, a mask over it and rounding are seen by whoever reads `module.weight`, be it the module or a head that is tied to an embedding
(`F.linear(h, embedding.weight)`). Torch makes a class for a module that is parametrized; what stands over the parametrization is put on
that class (`show`), or on one more (`cover`). Modules of such classes can be copied and pickled: their class is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchopt.errors import StateError
from torchopt.state.marks import marked, unmark

Getter = Callable[[nn.Module, str], torch.Tensor]
SHOWN = "_torchopt_shown"  # of torch's class: {attribute: what computes it}
COVERED = "_torchopt_covered"  # of a class that `cover` made: (the attribute, what computes it)


def show(module: nn.Module, name: str, getter: Getter) -> None:
    """Let `module.<name>` be `getter(module, name)` from now on, where something is parametrized on the module, in place.

    Args:
        module: of a class that torch made for its parametrizations.
        name: the attribute.
        getter: a function of a file's top level, so that pickle finds it.
    """
    kind = type(module)
    unmark(module, name)
    setattr(kind, SHOWN, {**vars(kind).get(SHOWN, {}), name: getter})
    setattr(kind, name, property(lambda self: getter(self, name), _refuse(name)))


def uncompute(module: nn.Module, leaf: str, parameter: nn.Parameter, position: int | None = None) -> None:
    """Take torch's parametrization of `leaf` off this module only, and put a Parameter in its place, in place.

    Torch's own `remove_parametrizations` deletes the attribute from the class, which copies of the module share.

    Args:
        module: of a class that torch made for its parametrizations.
        leaf: what is parametrized.
        parameter: what stands there from now on.
        position: its place among the other Parameters; the last one if None.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
        >>> uncompute(layer, "weight", nn.Parameter(layer.weight.detach()))
        >>> type(layer).__name__, list(layer._parameters)
        ('Linear', ['bias', 'weight'])
    """
    stacks, kind = module.parametrizations, type(module)
    assert isinstance(stacks, nn.ModuleDict)
    del stacks[leaf]
    if len(stacks):  # something of the user's remains: a class like the injected one, without our attribute
        gone = (leaf, leaf.removesuffix("_orig"), SHOWN, "__dict__", "__weakref__")
        rest = {name: thing for name, thing in vars(kind).items() if name not in gone}
        rest[SHOWN] = {name: getter for name, getter in vars(kind).get(SHOWN, {}).items() if name not in gone}
        module.__class__ = type(kind.__name__, kind.__bases__, rest)
    else:
        del module._modules["parametrizations"]
        module.__class__ = kind.__bases__[0]
    others = list(module._parameters.items())
    position = len(others) if position is None else position
    module._parameters.clear()
    module._parameters.update([*others[:position], (leaf, parameter), *others[position:]])


def _refuse(name: str) -> Callable[[nn.Module, object], None]:
    """What an assignment to a computed weight does.

    Raises:
        StateError: always; nothing that trains would change.
    """

    def assign(module: nn.Module, value: object) -> None:
        raise StateError(
            f"{type(module).__name__}.{name}: is computed from masks and tables, and cannot be assigned after prepare; tie or replace "
            "weights before, or write into the Parameters of model.named_parameters()"
        )

    return assign


def cover(module: nn.Module, name: str, getter: Getter) -> None:
    """Let `module.<name>` be `getter(module, name)` from now on, in place; the getter finds what it covers by `covered`.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> cover(layer, "weight", _twice)
        >>> torch.equal(layer.weight, 2 * layer._parameters["weight"])
        True
        >>> uncover(layer)
        >>> layer.weight is layer._parameters["weight"]
        True
    """
    kind = type(module)
    made = {name: property(lambda self: getter(self, name)), COVERED: (name, getter), "__reduce_ex__": reduced}
    module.__class__ = type(kind.__name__, (kind,), {**made, "__module__": kind.__module__, "__doc__": kind.__doc__})


def uncover(module: nn.Module) -> None:
    """Take off what `cover` put on last, in place; nothing where nothing is on."""
    if COVERED in vars(type(module)):
        module.__class__ = type(module).__bases__[0]


def covered(module: nn.Module, name: str) -> Any:
    """Return `module.<name>` as it is beneath what `cover` put on it."""
    kind = next((c.__bases__[0] for c in type(module).__mro__ if vars(c).get(COVERED, ("",))[0] == name), type(module))
    below = getattr(kind, name, None)
    if isinstance(below, property):
        assert below.fget is not None
        return below.fget(module)
    own = marked(module, name)
    return own if own is not None else module._parameters[name]


def is_shown(module: nn.Module, name: str) -> bool:
    """True where `show` has made `module.<name>`; asks without computing it."""
    return any(name in vars(kind).get(SHOWN, ()) for kind in type(module).__mro__)


def reduced(module: nn.Module, protocol: Any = None) -> tuple[Any, ...]:
    """How pickle writes a module of a class that was made for it: the class that it has in code, what stands on that, and its state."""
    kind, steps = type(module), []
    while getattr(kind, "__reduce_ex__", None) is reduced:
        if COVERED in vars(kind):
            steps.append(vars(kind)[COVERED])
        else:
            leaves = [leaf for leaf in module._modules["parametrizations"]._modules if leaf in vars(kind)]  # type: ignore[union-attr]
            steps.append((leaves, vars(kind).get(SHOWN, {})))
        kind = kind.__bases__[0]
    own = any("__getstate__" in vars(base) for base in kind.__mro__[:-1])  # recurrent layers leave weak references out
    return remade, (kind, steps[::-1]), kind.__getstate__(module) if own else module.__dict__.copy()  # type: ignore[attr-defined]


def remade(kind: type[nn.Module], steps: list[tuple[Any, Any]]) -> nn.Module:
    """Return an empty module of a class like the one that `reduced` found."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for what, how in steps:
        if isinstance(what, str):
            cover(module, what, how)
            continue
        parametrize._inject_new_class(module)
        can_be_pickled(module)
        for leaf in what:
            parametrize._inject_property(module, leaf)
            cannot_be_assigned(module, leaf)
        for name, getter in how.items():
            show(module, name, getter)
    return module


def can_be_pickled(module: nn.Module) -> None:
    """Let pickle write a parametrized module, which torch refuses, in place."""
    type(module).__reduce_ex__ = reduced  # type: ignore[method-assign, assignment]


def cannot_be_assigned(module: nn.Module, leaf: str) -> None:
    """Let an assignment to a parametrized attribute be refused in one sentence, in place."""
    kind = type(module)
    setattr(kind, leaf, property(vars(kind)[leaf].fget, _refuse(leaf)))
    kind.register_parameter = _register_parameter  # type: ignore[method-assign, assignment]


def _register_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """What torch calls for a Parameter that is assigned."""
    if isinstance(getattr(type(module), name, None), property):
        _refuse(name)(module, parameter)
    nn.Module.register_parameter(module, name, parameter)


def _twice(module: nn.Module, name: str) -> torch.Tensor:
    """For the example."""
    return 2 * torch.as_tensor(covered(module, name))
