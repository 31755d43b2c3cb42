"""Layers of torch.ao as torch's own: the weight is the same integers times the same scales, and the grid is recorded beside it.

Three families hold weights: quantized layers (packed for a processor's library), reference layers (float layers that remember how
their weight is rounded), and plain quantized tensors that a graph hands to a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized as theirs
from torch.ao.nn.quantized import reference

from torchopt.errors import ModelError
from torchopt.network.core_layer import CONV, plain
from torchopt.network.grid import Grid, set_grid

SYMMETRIC = "ask torch.ao for symmetric qint8 weights, as its default qconfigs do"
WEIGHTED: dict[type[nn.Module], str] = {  # before their bases, where one is another's
    theirs.Linear: "Linear",
    theirs.ConvTranspose1d: "ConvTranspose1d",
    theirs.ConvTranspose2d: "ConvTranspose2d",
    theirs.ConvTranspose3d: "ConvTranspose3d",
    theirs.Conv1d: "Conv1d",
    theirs.Conv2d: "Conv2d",
    theirs.Conv3d: "Conv3d",
}
REFERENCES = (
    reference.Linear,
    reference.Conv1d,
    reference.Conv2d,
    reference.Conv3d,
    reference.ConvTranspose1d,
    reference.ConvTranspose2d,
    reference.ConvTranspose3d,
)
SHAPE = (*CONV, "padding_mode", "output_padding")


def chain(name: str, module: Any) -> list[nn.Module]:
    """Return the float layers that compute, one after the other, what a module of torch.ao computes before it rounds.

    Args:
        name: what to call it in an error.
        module: any module; one that is not of torch.ao is returned as it is.

    Raises:
        ModelError: it is a layer that has no form here, or its weight lies on a grid that integer kernels do not take.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch.ao.nn"):
        return [module]
    if isinstance(module, nn.Sequential):
        return [part for child in module.children() for part in chain(name, child)]
    if isinstance(module, REFERENCES):
        return [layer_of(name, kind.__name__, module.get_quantized_weight(), module.bias, _shape(kind.__name__, module))]
    relu: list[nn.Module] = [nn.ReLU()] if "ReLU" in kind.__name__ and kind.__module__.startswith("torch.ao.nn.intrinsic") else []
    of = next((plain_kind for quantized, plain_kind in WEIGHTED.items() if isinstance(module, quantized)), None)
    if of is not None:
        return [layer_of(name, of, module.weight(), module.bias(), _shape(of, module)), *relu]
    return [*_other(name, module), *relu]


def layer_of(name: str, kind: str, weight: torch.Tensor, bias: torch.Tensor | None, fields: Mapping[str, Any]) -> nn.Module:
    """Return torch's layer on the values of a quantized weight, with its grid recorded.

    Args:
        name: what to call it in an error.
        kind: the class, such as "Conv2d".
        weight: a quantized tensor, one scale for it or one a channel.
        bias: float32, or None.
        fields: the arguments of the class that its tensors do not tell.

    Raises:
        ModelError: as `values`.
    """
    value, scale, axis = values(name, weight)
    layer = plain({"weight": value, "bias": None if bias is None else bias.detach().float().clone()}, kind, fields)
    set_grid(layer.requires_grad_(False), "weight", scale, 8, axis)
    return layer


def values(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Return what a quantized weight stands for: its values, its scale () or (channels,), and the axis of the channels.

    Raises:
        ModelError: the weight has a zero point, or a type without integer kernels.
    """
    if weight.dtype is not torch.qint8:
        raise ModelError(
            f"from_torch_ao: the weight of {name} is {weight.dtype}; ONNX Runtime's layers take int8, so {SYMMETRIC}"
        )
    axis: int | None = None
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        scale, zero, axis = weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), int(weight.q_per_channel_axis())
    elif weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point())
    else:
        raise ModelError(
            f"from_torch_ao: the weight of {name} is {weight.qscheme()}, which has no layers in ONNX Runtime; {SYMMETRIC}"
        )
    if bool(zero.ne(0).any()):
        raise ModelError(f"from_torch_ao: the weight of {name} has a zero point ({int(zero.abs().max())} at most); {SYMMETRIC}")
    scale = scale.to(torch.float32)
    grid = Grid(name=name, scale=scale, bits=8, axis=axis)
    return weight.int_repr().to(torch.float32) * grid.broadcast(weight.dim()), scale, axis


def _shape(kind: str, module: Any) -> dict[str, Any]:
    """The arguments of a convolution that its tensors do not tell; none for a linear layer."""
    names = SHAPE if "Transpose" in kind else SHAPE[:-1]
    return {field: getattr(module, field) for field in names} if "Conv" in kind else {}


def _other(name: str, module: Any) -> list[nn.Module]:
    """Layers without an integer weight: what they compute on floats."""
    match module:
        case theirs.Quantize() | theirs.DeQuantize() | theirs.Dropout():
            return []
        case theirs.BatchNorm2d() | theirs.BatchNorm3d():
            kind = "BatchNorm2d" if isinstance(module, theirs.BatchNorm2d) else "BatchNorm3d"
            return [plain(module.state_dict(), kind, {"eps": module.eps})]
        case theirs.ReLU6():
            return [nn.ReLU6()]
        case theirs.ELU():
            return [nn.ELU(module.alpha)]
        case theirs.LeakyReLU():
            return [nn.LeakyReLU(module.negative_slope)]
        case theirs.PReLU():
            layer = nn.PReLU(module.num_parameters)
            layer.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
            return [layer]
        case nn.Hardswish() | nn.Sigmoid() | nn.Softmax() | nn.LayerNorm() | nn.GroupNorm():
            return [_float(module)]
        case nn.InstanceNorm1d() | nn.InstanceNorm2d() | nn.InstanceNorm3d():
            return [_float(module)]
    raise ModelError(
        f"from_torch_ao: {name} is a {type(module).__module__}.{type(module).__name__}, which has no form here; leave it out of torch.ao's "
        "qconfig, or quantize the float network with torchopt.prepare"
    )


def _float(module: Any) -> nn.Module:
    """The float layer that a quantized subclass of it was made from."""
    kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn"))
    layer: nn.Module = object.__new__(kind)
    layer.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ("scale", "zero_point")})
    layer._buffers = {k: v for k, v in module._buffers.items() if k not in ("scale", "zero_point")}
    return layer
