"""Where a file first computes something else than the model: each layer's output in torch beside that in ONNX Runtime.

Torch's are caught by hooks on the modules that have weights. In the file a layer is found by its weight's name: the node that reads
it, past the nodes that only decode it (DequantizeLinear, Cast, Transpose, Reshape, a scale). A layer's module may end later than
that node (a bias, a batch norm, an activation), so the tensors after it, to the next layer, stand for it too, and the closest counts.
They are made outputs of an unpacked copy of the graph. ONNX Runtime fuses less there: a quantized layer runs between its
DequantizeLinear nodes in float, which is what torch computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from torchopt.errors import FileError, TorchoptError
from torchopt.network.surgery import evaluating
from torchopt.network.weights import weights

DECODES = {"DequantizeLinear", "Cast", "Transpose", "Reshape", "Mul", "Pad", "Slice"}
FINISHES = {"Add", "BatchNormalization", "Relu", "Clip", "Cast", "Mul", "Reshape", "Transpose", "Sub", "Div"}
AFTER = 6  # nodes after a layer's own that may still belong to its module


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """How far apart one layer's outputs are: `relative` is `max_abs` over the largest output in torch."""

    layer: str
    max_abs: float
    relative: float


Feeds = Callable[[onnxruntime.InferenceSession], Mapping[str, Any]]


def differences(
    model: nn.Module, graph: ir.Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], feed: Feeds, where: str
) -> list[LayerDifference]:
    """Return the difference of each layer that is found in both, in the order in which the file computes them.

    Args:
        model: what was exported.
        graph: the file's graph, dense.
        args: of one call of the model.
        kwargs: of the same call.
        feed: what a session of the graph takes for it.
        where: what an error names.

    Raises:
        FileError: ONNX Runtime refuses the graph.
    """
    places = _places(graph, model)
    ours = _by_torch(model, args, kwargs, {name for name, _, _ in places})
    theirs = _by_ort(graph, feed, [value for _, _, values in places for value in values], where)
    found = []
    for name, call, values in places:
        if call < len(ours.get(name, [])):
            expected = ours[name][call]
            same = [y for v in values if (y := _narrowed(theirs[v], expected)).shape == expected.shape and expected.size]
            apart = [np.abs(expected - y).max() for y in same]
            if apart:
                largest = max(float(np.abs(expected).max()), 1e-30)
                found.append(LayerDifference(layer=name, max_abs=float(min(apart)), relative=float(min(apart)) / largest))
    return found


def _narrowed(theirs: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Without the zero channels that `export.passes.WideChannelsPass` adds."""
    return theirs[:, : expected.shape[1]] if theirs.ndim == expected.ndim > 2 else theirs


def _places(graph: ir.Model, model: nn.Module) -> list[tuple[str, int, list[str]]]:
    """(module, its how-manieth call, the tensors that may be its output) in the order of the file's nodes."""
    order = {id(node): number for number, node in enumerate(graph.graph)}
    found = []
    for weight in weights(model):
        name = next((n for n in (weight.name, *weight.aliases) if n in graph.graph.initializers), None)
        if name is not None:
            nodes = sorted({id(n): n for n in _computing(graph.graph.initializers[name])}.values(), key=lambda n: order[id(n)])
            found += [(order[id(n)], weight.module_name, i, [str(v.name) for v in _ends(n)]) for i, n in enumerate(nodes)]
    return [(module, call, values) for _, module, call, values in sorted(found)]


def _computing(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute with a weight, past those that decode it."""
    for user, _ in value.uses():
        others = [v for v in user.inputs if v is not None and v is not value]
        if user.op_type in DECODES and all(v.is_initializer() or _constant(v) for v in others):
            yield from _computing(user.outputs[0])
        else:
            yield user


def _constant(value: ir.Value) -> bool:
    """A tensor that nodes compute from initializers alone, such as a scale that was stored as float16."""
    node = value.producer()
    return node is not None and all(v is None or v.is_initializer() for v in node.inputs)


def _ends(node: ir.Node) -> list[ir.Value]:
    values, last = [node.outputs[0]], [node.outputs[0]]
    while last and len(values) < AFTER:
        last = [user.outputs[0] for value in last for user, _ in value.uses() if user.op_type in FINISHES]
        values += [value for value in last if all(value is not v for v in values)]
    return values


@torch.no_grad()
def _by_torch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: set[str]) -> dict[str, list[np.ndarray]]:
    caught: dict[str, list[np.ndarray]] = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                caught.setdefault(name, []).append(output.detach().cpu().float().numpy().copy())

        return hook

    hooks = [module.register_forward_hook(catch(name)) for name, module in model.named_modules() if name in names]
    try:
        with evaluating(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def _by_ort(graph: ir.Model, feed: Feeds, names: list[str], where: str) -> dict[str, np.ndarray]:
    """Run the graph with the named tensors as outputs."""
    if not names:
        return {}
    there = {str(v.name) for v in graph.graph.outputs}
    values = {str(v.name): v for node in graph.graph for v in node.outputs if v is not None}
    wanted = list(dict.fromkeys(names))
    proto = ir.to_proto(graph)
    for name in wanted:
        if name not in there:
            added = proto.graph.output.add()
            added.name = name
            if values[name].dtype is not None:
                added.type.tensor_type.elem_type = int(values[name].dtype)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        opened = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = opened.run(wanted, dict(feed(opened)))
    except TorchoptError:
        raise
    except Exception as error:  # the runtime's exceptions share no class
        raise FileError(f"{where}: ONNX Runtime does not run it layer by layer: {str(error).strip()[:300]}") from error
    return {name: np.asarray(value, dtype=np.float32) for name, value in zip(wanted, outputs, strict=True)}
