"""Layers that are torch's in other clothes, put into torch's own: before rules are matched, so that every technique reaches them.

1. a weight that torch computes in each call: by a hook (`torch.nn.utils.weight_norm`, `spectral_norm`)     what that gives, plain
   or by a parametrization (`torch.nn.utils.parametrizations`)
2. a linear layer that keeps its weight the other way round, as transformers' `Conv1D`: y = x·W + b         nn.Linear with Wᵀ

The second is told by what it computes, in both modes, and not by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from torchopt.network.computed import uncompute
from torchopt.network.copies import copied
from torchopt.network.core_layer import plain
from torchopt.network.proof import TOLERANCE, undisturbed
from torchopt.network.surgery import evaluating, set_module
from torchopt.network.weights import Skipped

TORCHS = "torch.nn.utils.parametrizations"  # where torch's own parametrizations stand
ROWS = 3  # of the input that a layer is tried on


def known(model: nn.Module, covered: Callable[[nn.Module], Collection[str]] | None = None) -> tuple[nn.Module, list[Skipped]]:
    """Return the network with such layers replaced, itself where there is none, and what to say about it.

    Args:
        model: the network.
        covered: tells the names of the weights that rules reach; what a parametrization computes elsewhere stays computed. Without it
            all are reached.

    Example:
        >>> net, said = known(nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 1))))
        >>> type(net[0].weight).__name__, said[0].technique
        ('Parameter', 'spectral_norm')
    """
    hooked, turned = hooked_weights(model), turned_linears(model)
    if hooked or turned:
        model = copied(model)
        bake_computed(model, hooked)
        model = turn(model, turned)
    computed = parametrized_weights(model)
    if computed and covered is not None:
        names = covered(model)
        computed = {name: kind for name, kind in computed.items() if name in names}
    if computed:
        model = copied(model)
        bake_computed(model, computed)
    reason = "it computed this weight in each call; it is one weight now, which trains and is compressed as any other"
    return model, [Skipped(name=name, technique=kind, reason=reason) for name, kind in (hooked | computed).items()]


def as_saved(fresh: nn.Module, tensors: Mapping[str, Any], linears: Sequence[str]) -> nn.Module:
    """Return a freshly built network in the form that a file's was: with the weights and the linear layers that the file names."""
    computed = hooked_weights(fresh) | parametrized_weights(fresh)
    bake_computed(fresh, {name: kind for name, kind in computed.items() if name in tensors})
    return turn(fresh, [path for path in turned_linears(fresh) if path in linears])


def hooked_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights that a hook of torch's computes in each call, by name, and what the hook is."""
    found = {}
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                found[f"{path}.{hook.name}" if path else hook.name] = kind
    return found


def parametrized_weights(model: nn.Module) -> dict[str, str]:
    """Return the weights that torch's own parametrizations compute, by name, and which these are.

    Example:
        >>> parametrized_weights(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))
        {'weight': 'weight_norm'}
    """
    found = {}
    for path, module in model.named_modules():
        for param, steps in getattr(module, "parametrizations", {}).items() if parametrize.is_parametrized(module) else ():
            if all(type(step).__module__ == TORCHS for step in steps):
                found[f"{path}.{param}" if path else param] = _in_words(type(steps[0]).__name__)
    return found


def _in_words(name: str) -> str:
    """`_WeightNorm` as the function is called that puts it on a module: weight_norm."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def bake_computed(model: nn.Module, names: Mapping[str, str]) -> None:
    """Make Parameters of weights that are computed, in place."""
    for name, kind in names.items():
        path, _, param = name.rpartition(".")
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, param):
            with evaluating(module), torch.no_grad():  # in training mode spectral norm would go one iteration on
                value = getattr(module, param).detach().clone()
            trains = any(p.requires_grad for p in module.parametrizations[param].parameters())  # type: ignore[union-attr, index]
            uncompute(module, param, nn.Parameter(value, requires_grad=trains), 0)
        elif kind == "weight_norm":
            nn.utils.remove_weight_norm(module, param)
        else:
            with evaluating(module):  # one more power iteration would give another weight
                nn.utils.remove_spectral_norm(module, param)
            for key, hook in list(module._load_state_dict_pre_hooks.items()):  # torch looks for it unwrapped, and leaves it
                if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
                    del module._load_state_dict_pre_hooks[key]


def turned_linears(model: nn.Module) -> list[str]:
    """Return the paths of modules that compute x·W + b with a weight of shape (inputs, outputs)."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
    return [
        path for path, m in model.named_modules() if _may_be(m) and owners[id(m._parameters["weight"])] == 1 and _is_turned(m)
    ]


def turn(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Put an nn.Linear with the weight turned in the place of each, in place; a network that is such a layer is replaced."""
    for path in paths:
        module = model.get_submodule(path)
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        turned = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        layer = plain({"weight": turned, "bias": bias}, "Linear", {}).train(module.training)
        if not path:
            return layer
        set_module(model, path, layer)
    return model


def _may_be(module: nn.Module) -> bool:
    """True for a module of anyone's own that holds a matrix, perhaps a bias, and nothing else."""
    tensors = {name: p for name, p in module._parameters.items() if p is not None}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    bare = not module._modules and not module._buffers and set(tensors) <= {"weight", "bias"}
    if type(module).__module__.startswith("torch.") or not bare or weight is None or weight.dim() != 2:
        return False
    return not isinstance(module, nn.Linear | nn.Embedding) and (bias is None or bias.shape == weight.shape[1:])


def _is_turned(module: nn.Module) -> bool:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    x = torch.randn((2, ROWS, len(weight)), generator=torch.Generator().manual_seed(0)).to(weight)
    with undisturbed(module), torch.no_grad():
        wanted = x @ weight if bias is None else x @ weight + bias
        try:
            given = [module.train(training)(x) for training in (False, True)]
        except Exception:  # it takes something else
            return False
    close = TOLERANCE * float(wanted.abs().max())
    return all(
        isinstance(y, torch.Tensor) and y.shape == wanted.shape and bool(((y - wanted).abs() <= close).all()) for y in given
    )
