"""Layers of torch.ao that round their inputs at run time: linear layers become `DynamicLinear`, recurrent ones keep their int8 weights.

Both round inputs to 8 bits on the range of each call; torch.ao's kernels may use 7 of them, and recurrent layers here use floats. So
the outputs are not the same numbers. They must be no further from those of exact inputs than torch.ao's are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.ao.nn import intrinsic
from torch.ao.nn.quantized import dynamic as theirs

from torchopt.errors import ModelError
from torchopt.from_torch_ao.layers import layer_of, values
from torchopt.network.grid import set_grid
from torchopt.network.proof import flat
from torchopt.network.surgery import set_module
from torchopt.quantize import DynamicLinear

SLACK = 1.5  # times torch.ao's own distance from exact inputs
KINDS: dict[type[nn.Module], type[nn.Module]] = {theirs.LSTM: nn.LSTM, theirs.GRU: nn.GRU}


def replaced(model: nn.Module) -> nn.Module:
    """Return `model` with its layers of torch.ao replaced, in place.

    Raises:
        ModelError: a layer is of another kind, or holds float16 weights.
    """
    for name, module in list(model.named_modules()):
        if not type(module).__module__.startswith("torch.ao.nn") or "Packed" in type(module).__name__:
            continue
        layer = _layer(name or type(module).__name__, module)
        if not name:
            return layer
        set_module(model, name, layer)
    return model.eval()


def _layer(name: str, module: Any) -> nn.Module:
    if isinstance(module, theirs.Linear):
        if not module.weight().is_quantized:
            raise ModelError(f"from_torch_ao: the weight of {name} is float16; use Quantize(mode='float16') on the float network")
        layer = DynamicLinear.of(layer_of(name, "Linear", module.weight(), module.bias(), {}))
        return nn.Sequential(layer, nn.ReLU()) if isinstance(module, intrinsic.quantized.dynamic.LinearReLU) else layer
    kind = KINDS.get(type(module))
    if kind is None:
        kind_ = type(module).__name__
        raise ModelError(f"from_torch_ao: {name} is a {kind_} of torch.ao, which has no form here; leave it out of its qconfig")
    return _recurrent(name, kind, module)


def _recurrent(name: str, kind: type[nn.Module], module: Any) -> nn.Module:
    fields = {f: getattr(module, f) for f in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")}
    layer: Any = kind(module.input_size, module.hidden_size, **fields)
    weights, biases = module.get_weight(), module.get_bias()
    for param in list(layer._parameters):
        if param.startswith("bias"):
            layer._parameters[param] = nn.Parameter(biases[param].detach().clone(), requires_grad=False)
            continue
        if not weights[param].is_quantized:
            raise ModelError(f"from_torch_ao: {name}.{param} is {weights[param].dtype}; ask torch.ao for qint8")
        value, scale, axis = values(f"{name}.{param}", weights[param])
        layer._parameters[param] = nn.Parameter(value, requires_grad=False)
        set_grid(layer, param, scale, 8, axis)
    layer._flat_weights = [layer._parameters[n] for n in layer._flat_weights_names]
    return layer


@torch.no_grad()
def refuse_other_outputs(model: nn.Module, ours: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a network that is further from exact inputs than torch.ao's.

    Raises:
        ModelError: says how far both are.
    """
    exact = copy.deepcopy(ours)
    for module in exact.modules():
        if isinstance(module, DynamicLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    right, a, b = (_outputs(m, inputs) for m in (exact, model, ours))
    theirs_off, ours_off = float((a - right).norm()), float((b - right).norm())
    if ours_off > SLACK * theirs_off + 1e-5 * float(right.norm()):
        raise ModelError(
            f"from_torch_ao: the outputs are {ours_off:.3g} from those of unrounded inputs, and torch.ao's {theirs_off:.3g}; quantize the "
            "float network with Quantize(mode='dynamic')"
        )


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
    return torch.cat(
        [t.flatten().double() for t in flat(model(*inputs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    )
