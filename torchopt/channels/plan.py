"""The architecture plan: which sizes a shrunken network has, as plain data, so that it reloads into a freshly built original.

Removing channels changes shapes of tensors and the hyper-parameters that modules remember (`out_channels`, `num_features`, …, and the
whole numbers of anyone's own modules), and attention that lost heads is no longer torch's own. The plan records all three; applying it
to the original network resizes what differs and touches nothing else. It holds no code and no tensors: those go into safetensors beside
it (`torchopt.save`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchopt.channels.layers.attention import HeadAttention, adopt
from torchopt.channels.note import NOTE, Shrunken, shrunken_of
from torchopt.channels.remembered import numbers, put
from torchopt.errors import StateError
from torchopt.state.marks import mark

SIZES = (
    "in_channels", "out_channels", "groups",  # convolutions
    "in_features", "out_features",  # linear
    "num_features", "num_channels", "num_groups", "num_parameters", "normalized_shape",  # norms, PReLU
    "num_embeddings", "embedding_dim",  # embedding
    "embed_dim", "head_dim", "num_heads", "kdim", "vdim",  # attention
    "input_size", "hidden_size", "proj_size",  # recurrent
)  # fmt: skip

Plan = dict[str, Any]


def plan_of(model: nn.Module) -> Plan:
    """Return the sizes of every module and the shape of every tensor of `model`, as JSON-able data.

    Example:
        >>> plan_of(nn.Linear(3, 2))
        {'sizes': {'': {'in_features': 3, 'out_features': 2}}, 'numbers': [], 'shapes': {'weight': [2, 3], 'bias': [2]}, 'heads': []}
    """
    plan: Plan = {
        "sizes": {name: found for name, module in model.named_modules() if (found := _sizes(module))},
        "numbers": [[number.module, list(number.path), number.value] for number in numbers(model)],
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)},
        "heads": [name for name, module in model.named_modules() if isinstance(module, HeadAttention)],
    }
    shrunken = shrunken_of(model)
    return plan if shrunken is None else plan | {"shrunken": shrunken.to_dict()}


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Give `model`, freshly built, the sizes of a plan, in place; what is resized holds zeros until a state is loaded.

    Args:
        model: the original architecture.
        plan: what `plan_of` returned for the shrunken network.

    Raises:
        StateError: the plan is not one, or belongs to another architecture.

    Example:
        >>> net = nn.Linear(8, 2)
        >>> apply_plan(net, plan_of(nn.Linear(3, 2)))
        >>> net.in_features, tuple(net.weight.shape)
        (3, (2, 3))
    """
    if not isinstance(plan, dict) or not {"sizes", "shapes"} <= set(plan):
        raise StateError("apply_plan: this is no architecture plan; give what torchopt.save wrote")
    modules = dict(model.named_modules())
    for name in plan.get("heads", ()):
        if not isinstance(modules.get(name), nn.MultiheadAttention):
            raise StateError(f"apply_plan: {name} is no nn.MultiheadAttention here; give the network that was saved")
    adopt(model, plan.get("heads", ()))
    for name, sizes in plan["sizes"].items():
        for attribute, size in sizes.items():
            if name in modules and attribute in vars(modules[name]):
                setattr(modules[name], attribute, tuple(size) if isinstance(size, list) else size)
    for name, path, value in plan.get("numbers", ()):
        if name in modules and path[0] in vars(modules[name]):
            put(model, name, path, value)
    for name, shape in plan["shapes"].items():
        owner, _, tensor = name.rpartition(".")
        if owner in modules:
            _resize(modules[owner], tensor, shape, name)
    if "shrunken" in plan:
        mark(model, NOTE, Shrunken.from_dict(plan["shrunken"]))


def _sizes(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in SIZES:
        size = vars(module).get(attribute)
        if isinstance(size, int) and not isinstance(size, bool):
            found[attribute] = size
        elif isinstance(size, tuple):
            found[attribute] = list(size)
    return found


def _resize(module: nn.Module, tensor: str, shape: list[int], name: str) -> None:
    old: torch.Tensor | None = module._parameters.get(tensor)
    old = module._buffers.get(tensor) if old is None else old
    if old is None or list(old.shape) == shape:
        return
    if old.dim() != len(shape):
        raise StateError(f"apply_plan: {name} has {old.dim()} dimensions and the plan says {shape}; give the same architecture")
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if tensor in module._parameters:
        module._parameters[tensor] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        module.register_buffer(tensor, new)  # persistent: the state that follows holds it
