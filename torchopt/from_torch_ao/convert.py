"""A network that `torch.ao.quantization` has quantized becomes a finalized one of torchopt, with the same integers.

Whatever form it comes in is first brought to one of two that run:

    prepared in eager mode   → `convert`                  → modules on quantized tensors, traced
    prepared by FX           → `convert_to_reference_fx`  → float layers between quantize and dequantize
    converted, reference     → as it is

That form is run once on the example inputs. Each value that is a quantized tensor then tells its own grid (`rewrite.py`), whatever
operator made it, so no table of observers, qconfigs or backends is needed. At last every value is compared (`proof.py`).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.ao import quantization as ao
from torch.ao.nn.quantized import dynamic as dynamic_layers
from torch.ao.quantization import quantize_fx

from torchopt.errors import ModelError
from torchopt.from_torch_ao.at_run_time import refuse_other_outputs, replaced
from torchopt.from_torch_ao.proof import prove
from torchopt.from_torch_ao.rewrite import Values, rewritten
from torchopt.process.ordinary import alone

OBSERVERS = (ao.ObserverBase, ao.FakeQuantizeBase)
REMEDY = "from_torch_ao takes what prepare_fx, prepare_qat_fx, convert_fx, convert_to_reference_fx, prepare, prepare_qat and convert return"


@alone()
def from_torch_ao(model: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """Return a finalized network with the integers of one that `torch.ao.quantization` has quantized.

    Prepared networks (calibrated, or trained with fake quantizers), converted ones and reference ones are taken, in eager and in FX
    graph mode, and networks whose layers round their inputs at run time (`quantize_dynamic`). Weights are equal bit for bit. Each
    rounded value is compared with torch.ao's from the same inputs, and may be one step away.

    Args:
        model: the network; it is not changed.
        example_inputs: the tensors of one call. They are run, so they should be data of the usual kind.

    Raises:
        ModelError: nothing of it is quantized, it was never calibrated, it cannot be traced, or it holds a type that ONNX Runtime has
            no kernels for (float16 weights, 4-bit embeddings, weights with a zero point).

    Example:
        >>> warnings.simplefilter("ignore")  # torch.ao announces its removal at every call
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_fx
        >>> net, x = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval(), torch.randn(8, 4)
        >>> prepared = prepare_fx(net, get_default_qconfig_mapping("x86"), (x,))
        >>> _ = prepared(x)
        >>> type(from_torch_ao(prepared, (x,))).__name__
        'Quantized'
    """
    _check(model, example_inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao announces its removal, and says which defaults it takes
        theirs = _runnable(copy.deepcopy(model).cpu().eval())
        if not any(_is_static(m) for m in theirs.modules()) and not _rounds_in_graph(theirs):
            return _at_run_time(theirs, example_inputs)
        graph = _traced(theirs).eval()
        seen = _seen(graph, example_inputs)
        ours, steps = rewritten(graph, seen)
        prove(ours, steps, seen, example_inputs)
        return ours


def _is_of_torch_ao(model: nn.Module) -> bool:
    """Return True where torch.ao's observers, fake quantizers or quantized layers stand in a network."""
    return any(isinstance(m, OBSERVERS) or type(m).__module__.startswith("torch.ao.nn") for m in model.modules()) or (
        isinstance(model, fx.GraphModule) and _rounds_in_graph(model)
    )


def _check(model: nn.Module, example_inputs: object) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"from_torch_ao: got {model!r:.40}; a torch.nn.Module is needed")
    if not isinstance(example_inputs, tuple):
        raise ModelError(
            f"from_torch_ao: example_inputs is {type(example_inputs).__name__}; a tuple of one call's tensors is needed"
        )
    if not _is_of_torch_ao(model):
        raise ModelError(f"from_torch_ao: nothing of {type(model).__name__} is quantized by torch.ao; {REMEDY}")
    for name, module in model.named_modules():
        if isinstance(module, ao.ObserverBase) and hasattr(module, "min_val") and _never_saw(module):
            raise ModelError(f"from_torch_ao: {name} has seen no data; run the prepared network on some batches first")


def _never_saw(observer: nn.Module) -> bool:
    low, high = torch.as_tensor(observer.min_val), torch.as_tensor(observer.max_val)
    return low.numel() == 0 or bool((low == float("inf")).any()) or bool((high == float("-inf")).any())


def _runnable(model: nn.Module) -> nn.Module:
    """The converted or the reference form, on a copy that is ours."""
    if not any(isinstance(m, OBSERVERS) for m in model.modules()):
        return model
    try:
        if not isinstance(model, fx.GraphModule):
            return ao.convert(model)
        reference = quantize_fx.convert_to_reference_fx(copy.deepcopy(model))
        return quantize_fx.convert_fx(model) if _rounds_at_run_time(reference) else reference
    except Exception as error:  # torch.ao raises whatever its parts raise
        raise ModelError(
            f"from_torch_ao: torch.ao cannot convert {type(model).__name__} itself: {_line(error)}; {REMEDY}"
        ) from error


def _rounds_at_run_time(graph: fx.GraphModule) -> bool:
    return any("choose_qparams" in str(node.target) for node in graph.graph.nodes)


def _is_static(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn") and "dynamic" not in kind.__module__ and "Packed" not in kind.__name__


def _rounds_in_graph(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule) and any("quantize" in str(node.target) for node in model.graph.nodes)


def _at_run_time(theirs: nn.Module, example_inputs: tuple[Any, ...]) -> nn.Module:
    """Layers that round their inputs at run time need no graph: each is replaced where it stands."""
    if not any(isinstance(m, dynamic_layers.Linear | dynamic_layers.LSTM | dynamic_layers.GRU) for m in theirs.modules()):
        raise ModelError(f"from_torch_ao: no layer of {type(theirs).__name__} computes with integers; {REMEDY}")
    ours = replaced(copy.deepcopy(theirs))
    refuse_other_outputs(theirs, ours, example_inputs)
    return ours


def _traced(model: nn.Module) -> fx.GraphModule:
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # whatever the model's code raises on a value that is not known while tracing
        raise ModelError(
            f"from_torch_ao: the forward of {type(model).__name__} cannot be traced ({_line(error)}); quantize it by "
            "torch.ao.quantization.quantize_fx, or with torchopt.prepare"
        ) from error


def _seen(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What each node of torch.ao's network gives."""
    values = Values(graph)
    try:
        values.run(*inputs)
    except Exception as error:  # whatever the network's code raises
        raise ModelError(f"from_torch_ao: torch.ao's own network does not run on example_inputs: {_line(error)}") from error
    return values.seen


class _Tracer(fx.Tracer):
    """Layers of torch and of torch.ao are single nodes."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
