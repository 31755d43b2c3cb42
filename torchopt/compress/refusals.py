"""What `prepare` refuses, before anything is copied: models that are wrapped, prepared, quantized, broken or computed by others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from torchopt.errors import ConfigError, ModelError, StateError
from torchopt.network.grid import grids
from torchopt.network.weights import Weight
from torchopt.rules import Assigned
from torchopt.state.counter import find_state, refuse_sharded

WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def refuse_model(model: nn.Module) -> None:
    """Refuse a model that cannot be prepared as it stands.

    Raises:
        StateError: it is prepared or quantized already.
        ModelError: it is no module, it is wrapped, or a weight is not finite.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"prepare: got {model!r:.40} as the model; a torch.nn.Module is needed")
    if find_state(model) is not None:
        raise StateError("prepare: the model is prepared already; call torchopt.finalize(model) first, then prepare its result")
    wrapper = type(model).__name__
    if wrapper in WRAPPERS:
        inner = WRAPPERS[wrapper]
        raise ModelError(f"prepare: the model is wrapped in {wrapper}; prepare model.{inner}, and wrap what prepare returns")
    refuse_sharded(model, "prepare")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ModelError(
                f"prepare: {name} has no data (device='meta'); give model.to_empty(device='cpu') with its weights loaded"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"prepare: {name} holds NaN or infinity; a trained, finite model is needed")
    quantized = next(iter(grids(model)), None)
    if quantized is not None:
        raise StateError(
            f"prepare: {quantized} lies on an integer grid, the model is quantized already, and training would leave the grid; "
            "prune and cluster before quantization, or in the same rules"
        )


def refuse_weights(assigned: Sequence[Assigned]) -> None:
    """Refuse rules for weights that another parametrization computes, integer grids for weights that are not float32, and tables that
    data must weigh.

    Raises:
        ModelError: one of the first two is there.
        ConfigError: a rule asks for `Cluster(importance="fisher")`, which `one_shot` finds.
    """
    for weight, rule in ((a.weight, a.rule) for a in assigned):
        if rule.cluster is not None and rule.cluster.importance != "even":
            raise ConfigError(
                f"prepare: {weight.name}: importance={rule.cluster.importance!r} needs data; find the table with "
                "torchopt.one_shot(model, rules, batches) first, whose values a later prepare keeps and trains"
            )
        other = _computed_by(weight)
        if other:
            raise ModelError(
                f"prepare: {weight.name} is computed by {other}; call torch.nn.utils.parametrize.remove_parametrizations"
                f"(module, {weight.param!r}) on its module first, which keeps the value"
            )
        if rule.quantize is not None and weight.trainable.dtype != torch.float32:
            raise ModelError(
                f"prepare: {weight.name} is {weight.trainable.dtype}; quantization rounds float32 weights: give model.float(), "
                "and train under torch.autocast where half precision is wanted"
            )
        if rule.quantize is not None and rule.quantize.mode == "float16" and bool(weight.value.detach().half().isinf().any()):
            raise ModelError(
                f"prepare: {weight.name} holds {float(weight.value.detach().abs().max()):.6g}, and float16 ends at 65504; leave it out of "
                "mode='float16', or scale it down"
            )


def _computed_by(weight: Weight) -> str:
    """The name of the parametrization that stands on a weight; empty where it is an ordinary Parameter."""
    if not parametrize.is_parametrized(weight.module, weight.param):
        return ""
    return type(weight.module.parametrizations[weight.param][0]).__name__  # type: ignore[index, union-attr]
