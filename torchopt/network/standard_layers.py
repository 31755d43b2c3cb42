"""Layers that are torch's in other clothes, put into torch's own: before rules are matched, so that every technique reaches them.

1. a weight that a hook of torch's computes in each call (`torch.nn.utils.weight_norm`, `spectral_norm`)    what the hook gives, plain
2. a linear layer that keeps its weight the other way round, as transformers' `Conv1D`: y = x·W + b         nn.Linear with Wᵀ

The second is told by what it computes, in both modes, and not by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from torchopt.network.copies import copied
from torchopt.network.core_layer import plain
from torchopt.network.proof import TOLERANCE, undisturbed
from torchopt.network.surgery import evaluating, set_module
from torchopt.network.weights import Skipped

ROWS = 3  # of the input that a layer is tried on


def known(model: nn.Module) -> tuple[nn.Module, list[Skipped]]:
    """Return the network with such layers replaced, itself where there is none, and what to say about it.

    Example:
        >>> net, said = known(nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 1))))
        >>> type(net[0].weight).__name__, said[0].technique
        ('Parameter', 'spectral_norm')
    """
    hooked, turned = hooked_norms(model), turned_linears(model)
    if not hooked and not turned:
        return model, []
    plain_one = copied(model)
    bake_norms(plain_one, hooked)
    turned_root = turn(plain_one, turned)
    reason = "its hook computed this weight in each call; it is one weight now, which trains and is compressed as any other"
    return turned_root, [Skipped(name=name, technique=kind, reason=reason) for name, kind in hooked.items()]


def as_saved(fresh: nn.Module, tensors: Mapping[str, Any], linears: Sequence[str]) -> nn.Module:
    """Return a freshly built network in the form that a file's was: with the weights and the linear layers that the file names."""
    bake_norms(fresh, {name: kind for name, kind in hooked_norms(fresh).items() if name in tensors})
    return turn(fresh, [path for path in turned_linears(fresh) if path in linears])


def hooked_norms(model: nn.Module) -> dict[str, str]:
    """Return the weights that a hook of torch's computes in each call, by name, and what the hook is."""
    found = {}
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
                found[f"{path}.{hook.name}" if path else hook.name] = kind
    return found


def bake_norms(model: nn.Module, names: Mapping[str, str]) -> None:
    """Make Parameters of weights that hooks compute, in place."""
    for name, kind in names.items():
        path, _, param = name.rpartition(".")
        module = model.get_submodule(path)
        if kind == "weight_norm":
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
