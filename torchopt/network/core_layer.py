"""Torch's own layer over the tensors of another module: what a subclass with a forward of its own computes at its core.

A `BatchNormAct2d`, which normalizes and then activates, or a `Conv2dSame`, which pads by what it is given, calls one of torch's layers
as a function on its own parameters. The graph of a network shows that call, so the module can be replaced by the plain layer, and what
else it does stays in the graph. A layer is written in a file as its class and the arguments that its tensors do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

KINDS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    )
}  # fmt: skip
CONV = ("stride", "padding", "dilation", "groups")
EMBED = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
Described = tuple[str, dict[str, Any]]


def described(layer: nn.Module) -> Described | None:
    """Return the class of one of torch's layers and its arguments, as JSON-able values; None for what is none of them.

    Example:
        >>> described(nn.Conv2d(1, 2, 3, padding=1))
        ('Conv2d', {'stride': [1, 1], 'padding': [1, 1], 'dilation': [1, 1], 'groups': 1, 'padding_mode': 'zeros'})
    """
    name = type(layer).__name__
    if KINDS.get(name) is not type(layer):
        return None
    fields: tuple[str, ...] = ()
    if isinstance(layer, _ConvNd):
        fields = (*CONV, "padding_mode", *(("output_padding",) if layer.transposed else ()))
    elif isinstance(layer, _BatchNorm):
        fields = ("eps", "momentum")
    elif isinstance(layer, nn.Embedding):
        fields = EMBED
    values = {field: getattr(layer, field) for field in fields}
    return name, {field: list(v) if isinstance(v, tuple) else v for field, v in values.items()}


def plain(tensors: Mapping[str, torch.Tensor | None], name: str, fields: Mapping[str, Any]) -> nn.Module:
    """Return torch's layer over given tensors.

    Args:
        tensors: by their names in the layer: `weight`, `bias`, and the running statistics of a batch norm; others are left out.
        name: the class.
        fields: its arguments.

    Example:
        >>> weight = nn.Parameter(torch.ones(1, 2))
        >>> layer = plain({"weight": weight}, "Linear", {})
        >>> layer, layer.weight is weight
        (Linear(in_features=2, out_features=1, bias=False), True)
    """
    cls: Any = KINDS[name]
    values = {field: tuple(v) if isinstance(v, list) else v for field, v in fields.items()}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if issubclass(cls, _BatchNorm):
        layer = _norm(cls, tensors, values)
    else:
        assert weight is not None
        values |= {} if cls is nn.Embedding else {"bias": bias is not None}
        layer = cls(*_sizes(cls, weight, int(fields.get("groups", 1))), **values, device="meta")
    for param in layer._parameters:
        value = tensors.get(param)
        layer._parameters[param] = value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value)
    return layer  # type: ignore[no-any-return]


def _norm(cls: Any, tensors: Mapping[str, torch.Tensor | None], values: dict[str, Any]) -> Any:
    mean = tensors["running_mean"]
    assert mean is not None
    layer = cls(len(mean), affine=tensors.get("weight") is not None, **values, device="meta")
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        kept = tensors.get(buffer)
        layer._buffers[buffer] = torch.zeros((), dtype=torch.int64, device=mean.device) if kept is None else kept
    return layer


def _sizes(cls: Any, weight: torch.Tensor, groups: int) -> tuple[Any, ...]:
    if not issubclass(cls, _ConvNd):
        rows, columns = weight.shape
        return (rows, columns) if cls is nn.Embedding else (columns, rows)
    first, second, *kernel = weight.shape
    transposed = cls in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return (first, second * groups, tuple(kernel)) if transposed else (second * groups, first, tuple(kernel))
