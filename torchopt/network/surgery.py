"""Find and replace modules inside a network, set its mode for a while, and fold a batch norm into what precedes it.

A module is named by its dotted path from the root. Batch norm at inference is affine per channel, y = a·x + c with

    a = γ / √(σ² + ε)        c = β − a·μ

so that a convolution followed by it equals one convolution with weights a·w and bias a·b + c (Jacob et al. 2018,
arXiv:1712.05877, §3.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.errors import ModelError


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path; the empty path is the model itself.

    Raises:
        ModelError: there is none.

    Example:
        >>> get_module(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"{path}: the {type(model).__name__} has no such module; name one of its submodules") from error


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path of `model`, in place of what is there.

    Raises:
        ModelError: the parent does not exist, or the path is empty.

    Example:
        >>> net = nn.Sequential(nn.ReLU())
        >>> set_module(net, "0", nn.Tanh())
        >>> net[0]
        Tanh()
    """
    parent, _, name = path.rpartition(".")
    if not name:
        raise ModelError("set_module: the path is empty, the root cannot be replaced in itself; name a submodule")
    get_module(model, parent)._modules[name] = module


def module_of(traced: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node of a graph calls, or None.

    Example:
        >>> traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
        >>> [module_of(traced, node) for node in traced.graph.nodes]
        [None, ReLU(), None]
    """
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to the mode of every module.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> with evaluating(layer):
        ...     inside = layer.training
        >>> inside, layer.training
        (False, True)
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def batch_norm_affine(bn: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the per-channel factor and shift that an evaluated batch norm applies.

    Args:
        bn: a batch norm with running statistics.

    Returns:
        `(a, c)`, both float32 of shape (channels,), differentiable in γ and β.

    Raises:
        ModelError: the batch norm keeps no running statistics.

    Example:
        >>> bn = nn.BatchNorm2d(1, eps=0.0)
        >>> bn.running_mean.fill_(1.0), bn.running_var.fill_(4.0)
        (tensor([1.]), tensor([4.]))
        >>> [t.tolist() for t in batch_norm_affine(bn)]
        [[0.5], [-0.5]]
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ModelError("batch norm: keeps no running statistics (track_running_stats=False); it cannot be folded")
    factor = torch.rsqrt(bn.running_var + bn.eps)
    if bn.weight is not None:
        factor = bn.weight * factor
    shift = -bn.running_mean * factor
    return factor, shift if bn.bias is None else bn.bias + shift
