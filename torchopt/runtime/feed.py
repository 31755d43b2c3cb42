"""A batch of torch as a file takes it: which tensor is which input, in which type.

The exporter calls inputs after the arguments of `forward`, so names decide where they agree. Else, as with arguments that are lists
of tensors, order decides, and then there must be as many tensors as inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.errors import DataError
from torchopt.network.batches import Batch, model_inputs
from torchopt.network.structure import leaves
from torchopt.runtime.inputs import Feed


def feed_of_batch(model: nn.Module, opened: onnxruntime.InferenceSession, batch: Batch, where: str) -> Feed:
    """Return what a session takes for a batch of its model's.

    Raises:
        DataError: an input of the file is in no batch, or cannot be told from the others.
    """
    args, kwargs = model_inputs(model, batch)
    types = {spec.name: spec.type for spec in opened.get_inputs()}
    named, given = _named(model, args, kwargs), _tensors((args, kwargs))
    if not set(types) <= set(named):
        if len(given) < len(types) and set(named) & set(types):  # arguments with a default, which a tuple leaves to the labels
            missing = ", ".join(name for name in types if name not in named)
            raise DataError(
                f"verify: the file was exported with {missing}, which a batch does not give; give each batch as a dict of the "
                "arguments that it was exported with"
            )
        if len(given) != len(types):
            raise DataError(
                f"verify: {where} has the inputs {', '.join(types) or 'none'}, and a batch gives {len(given)} tensors "
                f"({', '.join(named) or 'without names'}); give batches of what the file was exported with"
            )
        named = dict(zip(types, given, strict=True))
    return {name: array(named[name], kind) for name, kind in types.items()}


def array(value: torch.Tensor, wanted: str) -> Any:
    """Return a tensor as the runtime takes it: float32 where the model computes in another precision."""
    value = value.detach().cpu()
    if wanted == "tensor(float)":
        return value.float().numpy() if value.is_floating_point() else value.numpy()
    if wanted == "tensor(bfloat16)" and value.is_floating_point():
        bits = value.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _named(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the arguments by the argument's name, and the place in it."""
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    found = leaves({**dict(zip(names, args, strict=False)), **kwargs})
    return {name: value for name, value in found if isinstance(value, torch.Tensor)}


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for _, leaf in leaves(values) for x in tree_leaves(leaf) if isinstance(x, torch.Tensor)]
