"""Static quantization: trace → fuse → place quantizers; what no graph shows is quantized where it stands.

1. a layer of the traced graph                                    fused with its neighbours, quantizers placed between layers
2. a layer inside a module that cannot be traced                   rounds its own input, a convolution its output too
3. a module of another kind (recurrent, embedding, bilinear)       its weights alone
4. the model's own forward cannot be traced                        case 2 for all of it, where `torch.export` can follow it and no batch
                                                                   norm has to be folded; else refused, with the line that is in the way
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchopt.errors import ModelError, StateError
from torchopt.network.copies import twin
from torchopt.network.weights import weights
from torchopt.quantize.calibration.proving import Origin, examples
from torchopt.quantize.config import Quantize
from torchopt.quantize.corrections import check
from torchopt.quantize.graph.float_front import leave_front
from torchopt.quantize.graph.fuse import fuse
from torchopt.quantize.graph.graphs import QuantizableGraph
from torchopt.quantize.graph.placement import lift_activations, place
from torchopt.quantize.graph.trace import trace
from torchopt.quantize.graph.tracer import forget
from torchopt.quantize.in_place import in_place, without_graph
from torchopt.quantize.layers.attention import open_attentions
from torchopt.quantize.layers.input_rounded import share_inputs
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.targets import Target


def static(
    model: nn.Module, assignment: dict[str, Quantize], example_inputs: tuple[Any, ...] | None, runtime: Target
) -> tuple[nn.Module, dict[str, str]]:
    """Return `model` with static fake quantizers, as `attach` describes, and why layers stay float, by path.

    Raises:
        StateError: example inputs are missing.
        ModelError: nothing of the assigned can be quantized, the network is itself a layer, or it takes other inputs.
    """
    if example_inputs is None:
        raise StateError("prepare: static quantization traces the model; give example_inputs=(x,), one call's arguments")
    origin = Origin(twin(model), examples(example_inputs))
    model, assignment = open_attentions(model, assignment)
    if "" in assignment and not next(model.children(), None):
        raise ModelError(
            f"quantize: the network itself is one {type(model).__name__}, and static quantization looks at the layers within; put it into "
            "nn.Sequential(model), or use mode='dynamic' or 'weight_only'"
        )
    try:
        traced, _ = trace(model, example_inputs)
        origin.prove(traced, "tracing")
        _tell_of_hooks(model, traced)
    except ModelError:
        if not _can_do_without(model, example_inputs):
            raise
        quantized, left, floats = model, list(assignment), dict[str, str]()
    else:
        front = leave_front(traced, assignment, runtime)
        assignment = {path: config for path, config in assignment.items() if path not in front}
        floats = {**type(traced).was.left, **front}  # type: ignore[union-attr]
        quantized, left = traced, _on_graph(traced, assignment, runtime)
    for path in left:
        if weights(quantized.get_submodule(path)):
            config = without_graph(quantized.get_submodule(path), assignment[path])
            quantized = in_place(quantized, path, config, runtime)
    if not any(isinstance(m, Fused) for m in quantized.modules()):
        raise ModelError(
            f"quantize: none of {list(assignment)[:3]} is called as a layer of a known class; use mode='dynamic' or 'weight_only'"
        )
    _try(quantized, example_inputs)
    origin.prove(quantized, "fusing")
    origin.prove_training(quantized)
    return quantized, floats


def _on_graph(traced: QuantizableGraph, assignment: dict[str, Quantize], runtime: Target) -> list[str]:
    """Case 1, in place; returns the paths of the others."""
    lift_activations(traced, set(assignment))
    left = fuse(traced, assignment, runtime)
    check(traced)
    if len(left) < len(assignment):
        place(traced, assignment, runtime)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    forget(traced.graph)
    return [path for path in left if path in dict(traced.named_modules())]


def _tell_of_hooks(model: nn.Module, traced: QuantizableGraph) -> None:
    """Warn of hooks on modules whose forward became part of the graph: what they compute is in it, and nobody calls them again."""
    called = {str(node.target) for node in traced.graph.find_nodes(op="call_module")}
    hooked = [
        path for path, m in model.named_modules() if path and path not in called and (m._forward_hooks or m._forward_pre_hooks)
    ]
    if hooked:
        more = f" (and {len(hooked) - 1} more modules)" if len(hooked) > 1 else ""
        warnings.warn(
            f"prepare: the forward hooks on {hooked[0]}{more} are not called any more, since the graph has the layers inside alone; "
            "register them on layers, or on the prepared network itself",
            stacklevel=2,
        )


def _can_do_without(model: nn.Module, example_inputs: tuple[Any, ...]) -> bool:
    """True where a model that symbolic tracing cannot follow can be quantized layer by layer, and exported."""
    if any(isinstance(m, _BatchNorm) for m in model.modules()):
        return False
    try:
        torch.export.export(model.eval(), example_inputs, strict=False)
    except Exception:
        return False
    return True


def _try(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """One call in evaluation mode, before any quantizer has seen data: it must run."""
    try:
        share_inputs(model, example_inputs)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"quantize: the traced model does not take the example inputs: {str(error).splitlines()[0]}") from error
