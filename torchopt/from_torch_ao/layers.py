"""Layers of torch.ao as torch's own: the weight is the same integers times the same scales, and the grid is recorded beside it.

Three families hold weights: quantized layers (packed for a processor's library), reference layers (float layers that remember how
their weight is rounded), and plain quantized tensors that a graph hands to a function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized as theirs
from torch.ao.nn.quantized import reference

from torchopt.errors import ModelError
from torchopt.network.grid import set_grid

SYMMETRIC = "ask torch.ao for symmetric qint8 weights, as its default qconfigs do"
CONVS: dict[type[nn.Module], type[nn.Module]] = {
    theirs.ConvTranspose1d: nn.ConvTranspose1d,
    theirs.ConvTranspose2d: nn.ConvTranspose2d,
    theirs.ConvTranspose3d: nn.ConvTranspose3d,
    theirs.Conv1d: nn.Conv1d,
    theirs.Conv2d: nn.Conv2d,
    theirs.Conv3d: nn.Conv3d,
}
REFERENCES: tuple[type[nn.Module], ...] = (
    reference.Linear,
    reference.Conv1d,
    reference.Conv2d,
    reference.Conv3d,
    reference.ConvTranspose1d,
    reference.ConvTranspose2d,
    reference.ConvTranspose3d,
)
SHAPE = ("stride", "padding", "dilation", "groups", "padding_mode")


def chain(name: str, module: nn.Module) -> list[nn.Module]:
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
        return [_of_reference(name, module)]
    relu: list[nn.Module] = [nn.ReLU()] if "ReLU" in kind.__name__ and kind.__module__.startswith("torch.ao.nn.intrinsic") else []
    if isinstance(module, theirs.Linear):
        return [linear(name, module.weight(), module.bias()), *relu]
    for quantized, plain in CONVS.items():
        if isinstance(module, quantized):
            return [_convolution(name, plain, module), *relu]
    return [*_other(name, module), *relu]


def linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """Return a linear layer on a quantized weight of shape (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return filled(name, layer, weight, bias)


def filled(name: str, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, param: str = "weight") -> nn.Module:
    """Give `layer` the values of a quantized weight, and record its grid.

    Args:
        name: what to call it in an error.
        layer: a float layer of the right shape.
        weight: a quantized tensor, one scale for it or one a channel.
        bias: float32, or None.
        param: the weight's name in the layer.

    Raises:
        ModelError: the weight has a zero point, or a type without integer kernels.
    """
    if weight.dtype is not torch.qint8:
        raise ModelError(
            f"from_torch_ao: the weight of {name} is {weight.dtype}; ONNX Runtime's layers take int8, so {SYMMETRIC}"
        )
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        scale, zero, axis = weight.q_per_channel_scales(), weight.q_per_channel_zero_points(), int(weight.q_per_channel_axis())
    elif weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero, axis = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point()), None
    else:
        raise ModelError(
            f"from_torch_ao: the weight of {name} is {weight.qscheme()}, which has no layers in ONNX Runtime; {SYMMETRIC}"
        )
    if bool(zero.ne(0).any()):
        raise ModelError(f"from_torch_ao: the weight of {name} has a zero point ({int(zero.abs().max())} at most); {SYMMETRIC}")
    scale = scale.to(torch.float32)
    shape = [1] * weight.dim()
    if axis is not None:
        shape[axis] = -1
    value = weight.int_repr().to(torch.float32) * scale.reshape(shape)
    layer._parameters[param] = nn.Parameter(value, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(torch.float32).clone(), requires_grad=False)
    set_grid(layer, param, scale.reshape(()) if axis is None else scale, 8, axis)
    return layer


def _convolution(name: str, plain: type[nn.Module], module: Any) -> nn.Module:
    extra = {"output_padding": module.output_padding} if "Transpose" in plain.__name__ else {}
    fields = {field: getattr(module, field) for field in SHAPE}
    bias = module.bias()
    layer = plain(module.in_channels, module.out_channels, module.kernel_size, bias=bias is not None, **fields, **extra)
    return filled(name, layer, module.weight(), bias)


def _of_reference(name: str, module: Any) -> nn.Module:
    plain = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn"))
    layer: nn.Module = object.__new__(plain)
    layer.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("weight_")})
    for own in ("_parameters", "_buffers", "_modules"):
        layer.__dict__[own] = {}
    layer._parameters["bias"] = None
    return filled(name, layer, module.get_quantized_weight(), module.bias)


def _other(name: str, module: Any) -> list[nn.Module]:
    """Layers without an integer weight: what they compute on floats."""
    match module:
        case theirs.Quantize() | theirs.DeQuantize() | theirs.Dropout():
            return []
        case theirs.BatchNorm2d() | theirs.BatchNorm3d():
            plain = nn.BatchNorm2d if isinstance(module, theirs.BatchNorm2d) else nn.BatchNorm3d
            return [_with_state(plain(module.num_features, module.eps), module)]
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


def _with_state(layer: nn.Module, module: nn.Module) -> nn.Module:
    state = module.state_dict()
    layer.load_state_dict({name: state[name] for name in layer.state_dict() if name in state}, strict=False)
    return layer.eval()


def _float(module: Any) -> nn.Module:
    """The float layer that a quantized subclass of it was made from."""
    plain = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn"))
    layer: nn.Module = object.__new__(plain)
    layer.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ("scale", "zero_point")})
    layer.__dict__["_buffers"] = {k: v for k, v in module._buffers.items() if k not in ("scale", "zero_point")}
    return layer
