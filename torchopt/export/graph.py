"""From a torch module to an ONNX graph: the only file that touches `torch.onnx`.

The exporter's own optimizer stays off. It would fold batch norm into the convolutions under the weights' own names, and a weight
in the file would no longer be the weight in torch; ORT folds batch norm itself when it loads a model. What is worth tidying is
done by the passes in `passes/`, one at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from torchopt.errors import DataError, ModelError
from torchopt.export.operators import operators
from torchopt.export.traced_grids import trace_grids, translations, type_codes
from torchopt.network.copies import copied

BATCH = "batch"
BRANCHES = "its code asks for a value that only data gives: decide it beforehand (torch's decoder layers: tgt_is_causal=True)"
INSTEAD = {"cdist": "write (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt() for torch.cdist(a, b)"}
FIXED = "the model fixes its batch size: export it with dynamic_batch=False"


def to_onnx(model: nn.Module, example_inputs: tuple[Any, ...], *, opset: int, dynamic_batch: bool) -> ir.Model:
    """Export `model`, in evaluation mode and on the CPU, and return the graph as the exporter wrote it.

    Args:
        model: a plain module; a copy of it is exported.
        example_inputs: the positional arguments of one forward call.
        opset: version of the ONNX operator set.
        dynamic_batch: let the first dimension of every tensor input vary, under the name "batch".

    Raises:
        DataError: the example inputs are not a tuple with tensors.
        ModelError: a weight is not finite, or the model cannot be exported.
    """
    _check(model, example_inputs)
    module = as_exported(model)
    trace_grids(module)
    version = max(opset, 18)
    inputs = tuple(_batch_of_two(x) if dynamic_batch else x for x in plain(example_inputs))
    shapes = tuple({0: torch.export.Dim(BATCH)} if _has_batch(x) else None for x in inputs) if dynamic_batch else None
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                optimize=False,
                opset_version=version,
                custom_translation_table=translations(version) | operators(version),
                input_names=_input_names(module, len(inputs)),
                dynamic_shapes=_nested(module, shapes),
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the model's code or its own raises
        raise ModelError(_sentence(type(model).__name__, error)) from error
    if program is None:
        raise ModelError(f"export: {type(model).__name__} cannot be exported to ONNX: the exporter returned nothing")
    if "Draft" in (getattr(program, "_capture_strategy", None) or ""):
        raise ModelError(
            f"export: {type(model).__name__} cannot be exported to ONNX: its forward depends on data, and this torch would write the one "
            "way that the example takes; use torch.where or torch.cond, or a newer torch"
        )
    if dynamic_batch:
        _check_batch(type(model).__name__, program.model.graph)
    type_codes(program.model.graph)
    _name_outputs(program.model.graph)
    return program.model


def _check(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            raise ModelError(
                f"export: {path or type(model).__name__} is a {type(module).__name__} of torch.ao.quantization, which no exporter takes; "
                "export what torchopt.from_torch_ao(model, example_inputs) returns"
            )
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ModelError(
                f"export: {path or type(model).__name__}: nn.LSTM(proj_size={module.proj_size}) has no form in ONNX, whose LSTM projects "
                "nothing; use nn.LSTM without proj_size, and an nn.Linear behind it"
            )
    if not isinstance(example_inputs, tuple) or not any(isinstance(x, torch.Tensor) for x in example_inputs):
        raise DataError(
            f"export: example_inputs is {type(example_inputs).__name__}; a tuple with the tensors of one call is needed"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"export: {name} holds NaN or infinity; export a trained, finite model")


def _check_batch(name: str, graph: ir.Graph) -> None:
    """The exporter drops a free dimension silently where the model's code fixes it."""
    for value in graph.inputs:
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], int):
            raise ModelError(
                f"export: {name} takes a batch of {value.shape[0]} only ({value.name} has the shape {list(value.shape)}); {FIXED}"
            )


def as_exported(model: nn.Module) -> nn.Module:
    """Return a copy of `model` as a file computes it: in evaluation mode, in float32, on the CPU."""
    return copied(model).cpu().eval().requires_grad_(False).float()


def plain(example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs as a file takes them: float32, whatever the precision of the weights."""
    return tuple(map(_plain, example_inputs))


def _plain(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.cpu().float() if x.is_floating_point() else x.cpu()


def _name_outputs(graph: ir.Graph) -> None:
    """Call one output "output", and several "output_0", "output_1", …"""
    single = len(graph.outputs) == 1
    for i, value in enumerate(graph.outputs):
        if not value.is_graph_input() and not value.is_initializer():
            value.name = "output" if single else f"output_{i}"


def _has_batch(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def _batch_of_two(x: Any) -> Any:
    """The exporter takes a dimension of size one for a constant."""
    return torch.cat([x, x]) if _has_batch(x) and x.shape[0] == 1 else x


def _positional(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def _input_names(module: nn.Module, count: int) -> list[str] | None:
    names = [p.name for p in _positional(module) if p.kind is not p.VAR_POSITIONAL][:count]
    return names if len(names) == count else None


def _nested(module: nn.Module, shapes: tuple[Any, ...] | None) -> Any:
    """`torch.export` wants the shapes of `*args` as one nested tuple."""
    parameters = _positional(module)
    if shapes is None or not (parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL):
        return shapes
    return (shapes,)


def _sentence(name: str, error: BaseException) -> str:
    reason = _reason(error)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='\w+\.(\w+)'", reason)
    if missing:
        operation = missing[1].removeprefix("_").removesuffix("_forward")
        remedy = INSTEAD.get(operation, "compute it from operations that ONNX has, or leave it to the code around the file")
        return f"export: {name} cannot be exported to ONNX, which has no form of torch's {operation}; {remedy}"
    fixed = re.search(r"onstraints violated|specialized|marked .* dynamic", f"{error} {reason}")
    remedy = f"; {FIXED}" if fixed else f"; {BRANCHES}" if "data-dependent" in reason else ""
    return f"export: {name} cannot be exported to ONNX: {reason}{remedy}"


def _reason(error: BaseException) -> str:
    """The sentence of the innermost error that says something."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0][:300] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log and its deprecation warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
