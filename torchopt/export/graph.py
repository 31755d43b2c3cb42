"""From a torch module to an ONNX graph: the only file that touches `torch.onnx`.

The exporter's own optimizer stays off. It would fold batch norm into the convolutions under the weights' own names, and a weight
in the file would no longer be the weight in torch; ORT folds batch norm itself when it loads a model. What is worth tidying is
done by the passes in `passes/`, one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.errors import ConfigError, ModelError
from torchopt.export.call import Call, by_row
from torchopt.export.operators import operators
from torchopt.export.other_sizes import fixed_by
from torchopt.export.traced_grids import trace_grids, translations, type_codes
from torchopt.network.copies import copied
from torchopt.network.proof import undisturbed

BRANCHES = "its code asks for a value that only data gives: decide it beforehand (torch's decoder layers: tgt_is_causal=True)"
INSTEAD = {"cdist": "write (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt() for torch.cdist(a, b)"}
FIXED = "the model fixes its batch size: export it with dynamic_batch=False"


def to_onnx(model: nn.Module, call: Call, *, opset: int) -> ir.Model:
    """Export `model`, in evaluation mode and on the CPU, and return the graph as the exporter wrote it.

    Args:
        model: a plain module; a copy of it is exported.
        call: the arguments of one forward call, and which of their dimensions are free.
        opset: version of the ONNX operator set.

    Raises:
        ModelError: a weight is not finite, or the model cannot be exported.
    """
    _check(model)
    module = as_exported(model, call)
    trace_grids(module)
    version = max(opset, 18)
    inputs = tuple(_batch_of_two(x) if 0 in free else x for x, free in zip(plain(call.inputs), call.free, strict=True))
    shapes = call.shapes
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                optimize=False,
                opset_version=version,
                custom_translation_table=translations(version) | operators(version),
                input_names=list(call.names) if call.names is not None else None,
                dynamic_shapes=_nested(module, shapes),
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the model's code or its own raises
        raise ModelError(_sentence(module, call, type(model).__name__, error)) from error
    if program is None:
        raise ModelError(f"export: {type(model).__name__} cannot be exported to ONNX: the exporter returned nothing")
    if "Draft" in (getattr(program, "_capture_strategy", None) or ""):
        raise ModelError(
            f"export: {type(model).__name__} cannot be exported to ONNX: its forward depends on data, and this torch would write the one "
            "way that the example takes; use torch.where or torch.cond, or a newer torch"
        )
    _check_free(module, call, type(model).__name__, program.model.graph)
    type_codes(program.model.graph)
    _name_outputs(program.model.graph, call.output_names)
    return program.model


@torch.no_grad()
def gives_dataclasses(model: nn.Module, call: Call) -> bool:
    """True where the network's result holds a dataclass, which no exporter takes."""
    try:
        with undisturbed(model):
            result = model(*plain(call.inputs))
    except Exception:  # whatever the model's code raises
        return False
    return any(dataclasses.is_dataclass(x) for x in tree_leaves(result))


def _check(model: nn.Module) -> None:
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
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"export: {name} holds NaN or infinity; export a trained, finite model")


def _check_free(module: nn.Module, call: Call, name: str, graph: ir.Graph) -> None:
    """The exporter drops a free dimension silently where the model's code fixes it."""
    tensors = [free for x, free in zip(call.inputs, call.free, strict=True) if isinstance(x, torch.Tensor)]
    for value, free in zip(graph.inputs, tensors, strict=False):
        for at, label in free.items():
            if value.shape is not None and isinstance(value.shape[at], int):
                if not at:
                    raise ModelError(
                        f"export: {name} takes a batch of {value.shape[0]} only ({value.name} has the shape {list(value.shape)}); {FIXED}"
                    )
                raise ModelError(
                    f"export: {name} takes {label!r} of {value.shape[at]} only ({value.name} has the shape {list(value.shape)})"
                    f"{fixed_by(module, call, label)}; leave it out of dynamic_shapes"
                )


def as_exported(model: nn.Module, call: Call) -> nn.Module:
    """Return a copy of `model` as a file computes it: in evaluation mode, in float32, on the CPU, tensors in a row."""
    module = copied(model).cpu().eval().requires_grad_(False).float()
    return by_row(module, call) if call.flat else module


def plain(example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs as a file takes them: float32, whatever the precision of the weights."""
    return tuple(map(_plain, example_inputs))


def _plain(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.cpu().float() if x.is_floating_point() else x.cpu()


def _name_outputs(graph: ir.Graph, names: tuple[str, ...] | None) -> None:
    """Call the outputs as asked, else one "output", and several "output_0", "output_1", …

    Raises:
        ConfigError: another number of names.
    """
    single = len(graph.outputs) == 1
    if names is not None and (len(names) != len(graph.outputs) or len(set(names)) != len(names)):
        raise ConfigError(f"export: output_names={list(names)}; {len(graph.outputs)} different names are needed")
    for i, value in enumerate(graph.outputs):
        if not value.is_graph_input() and not value.is_initializer():
            value.name = names[i] if names is not None else "output" if single else f"output_{i}"


def _has_batch(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def _batch_of_two(x: Any) -> Any:
    """The exporter takes a dimension of size one for a constant."""
    return torch.cat([x, x]) if _has_batch(x) and x.shape[0] == 1 else x


def _positional(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def _nested(module: nn.Module, shapes: tuple[Any, ...] | None) -> Any:
    """`torch.export` wants the shapes of `*args` as one nested tuple."""
    parameters = _positional(module)
    if shapes is None or not (parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL):
        return shapes
    return (shapes,)


def _sentence(module: nn.Module, call: Call, name: str, error: BaseException) -> str:
    reason = _reason(error)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='\w+\.(\w+)'", reason)
    if missing:
        operation = missing[1].removeprefix("_").removesuffix("_forward")
        remedy = INSTEAD.get(operation, "compute it from operations that ONNX has, or leave it to the code around the file")
        return f"export: {name} cannot be exported to ONNX, which has no form of torch's {operation}; {remedy}"
    fixed = re.search(r"onstraints violated|specialized|marked .* dynamic", f"{error} {reason}")
    inner = dict.fromkeys(label for free in call.free for at, label in free.items() if at)
    told = "".join(fixed_by(module, call, label) for label in inner) if fixed else ""
    if told:
        return f"export: {name} fixes a dimension that dynamic_shapes frees{told}; leave it out of dynamic_shapes"
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
