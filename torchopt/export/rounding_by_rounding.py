"""A quantized model and its file, compared rounding by rounding: each computes from the same integers, so that errors do not add up.

Two right computations of one network may end far apart: where floats stand between the integers (softmax, layer norm, GELU), each
library's own last bit puts a value now and then on the other side of half a step, and the layers behind carry that on. So outputs do
not tell a fault from rounding. What tells is each step by itself. The file gives the integers q of every QuantizeLinear on its own way,
and torch computes

    the integers that follow from q of the file, not from its own

at each of its quantizers: hooks compare what arrives, and hand on what the file has. A right file differs there in a few values in a
thousand, by one step; a wrong kernel or a wrong pass differs in its own place, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torchopt.quantize.graph.naming import name_of_value
from torchopt.quantize.layers.dynamic import DynamicLinear, dynamic_round
from torchopt.quantize.layers.input_rounded import Rounded
from torchopt.quantize.layers.kernels import IntegerKernel
from torchopt.quantize.layers.rounding import FixedQuantize

MOVES = {"Transpose", "Reshape", "Slice", "Clip"}
DYNAMIC = ""  # stands for all layers that round at run time, in the order of their calls: their nodes name no module

Fed = Mapping[str, np.ndarray]


class Roundings:
    """The nodes of a graph that round activations, found before the passes rewrite what is around them.

    Args:
        graph: what the exporter wrote.
        model: what it was given.
    """

    def __init__(self, graph: ir.Graph, model: nn.Module) -> None:
        fixed = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FixedQuantize)}
        self.nodes: dict[str, list[ir.Node]] = {}
        for node in graph:
            scale = node.inputs[1].name if node.op_type == "QuantizeLinear" and node.inputs[1] is not None else None
            owner = DYNAMIC if node.op_type == "DynamicQuantizeLinear" else (scale or "").removesuffix(".scale")
            if owner in fixed or node.op_type == "DynamicQuantizeLinear":
                self.nodes.setdefault(owner, []).append(node)

    def values(self) -> dict[str, list[list[str]]]:
        """For each quantizer, by its name, and each of its calls: the tensors of the file that may hold the integers; none if it is gone.

        The nodes that round at run time stand under "", each with its integers, scale and zero point.
        """
        return {owner: [_tensors(node) for node in nodes] for owner, nodes in self.nodes.items()}


def _tensors(node: ir.Node) -> list[str]:
    """What a node gives, and the same after what moves or clips it and has no other reader."""
    if node.graph is None:
        return []
    if node.op_type == "DynamicQuantizeLinear":
        return [str(value.name) for value in node.outputs]
    found, value = [node.outputs[0]], node.outputs[0]
    while len(users := [user for user, _ in value.uses()]) == 1 and users[0].op_type in MOVES and not value.is_graph_output():
        value = users[0].outputs[0]
        found = [value] if users[0].op_type == "Clip" and len(found) == 1 else [*found, value]
    return [str(value.name) for value in found]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rounding: what torch makes of the file's integers, and what the file makes of them, both in steps."""

    name: str
    ours: np.ndarray
    theirs: np.ndarray

    def apart(self) -> np.ndarray:
        """Whole steps between the two, an entry a value."""
        return np.abs(np.rint(self.ours) - np.rint(self.theirs))


class Forced:
    """Runs the file once, with the integers of its roundings as outputs, and torch on those integers.

    Args:
        model: what was exported, in evaluation mode.
        data: the file, dense.
        values: where the integers are (`Roundings.values`).
        inputs: the arguments of one call.
        fed: the same for the file.
    """

    def __init__(
        self, model: nn.Module, data: bytes, values: Mapping[str, list[list[str]]], inputs: Sequence[Any], fed: Fed
    ) -> None:
        self.model, self.inputs = model, tuple(inputs)
        self.file = File(data, values, fed)
        results = self.file.run(self.file.shown)
        self.found, self.outputs = self.file.integers(results), [results[name] for name in self.file.own]
        modules = dict(model.named_modules(remove_duplicate=False))
        self.places = {id(modules[name]): (name, found) for name, found in self.found.items() if name != DYNAMIC}
        self.missed = 0

    @torch.no_grad()
    def steps(self, noise: torch.Generator | None = None, size: float = 0.0) -> tuple[list[Step], list[np.ndarray]]:
        """Return every rounding in the order of torch's calls, and torch's outputs.

        Args:
            noise: is added to what is handed on.
            size: of the noise, relative.
        """
        self.noise, self.size, self.missed = noise, size, 0
        self.calls: dict[int, int] = {}
        self.taken: dict[int, Step] = {}  # by the tensor that was handed on
        self.kept: list[torch.Tensor] = []  # so that no id is used twice
        self.same: dict[tuple[int, int], torch.Tensor] = {}
        self.last: dict[int, torch.Tensor] = {}
        hooks = [handle for module in self.model.modules() for handle in self._hooks(module)]
        try:
            results = self.model(*self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return list(self.taken.values()), [_numpy(y) for y in tree_leaves(results) if isinstance(y, torch.Tensor)]

    def _hooks(self, module: nn.Module) -> list[Any]:
        if isinstance(module, FixedQuantize):
            return [module.register_forward_hook(self._fixed)]
        if isinstance(module, IntegerKernel):
            return [module.register_forward_hook(lambda kernel, args, y: self._instead(args[0], y, kernel.linked[2]))]
        if isinstance(module, Rounded) and module.output is not None:
            return [module.register_forward_hook(self._layer)]
        return [module.register_forward_pre_hook(self._dynamic)] if isinstance(module, DynamicLinear) else []

    def _fixed(self, module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        """Compare what a quantizer gives, and give what the file has."""
        again = self.same.get((id(module), id(args[0])))
        if again is not None:
            return again
        name, calls = self.places.get(id(module), ("", []))
        number = self.calls[id(module)] = self.calls.get(id(module), -1) + 1
        codes = _shaped(calls[number], y.shape, int(module.zero_point)) if number < len(calls) else None
        if codes is None:
            self.missed += 1
            return y
        zero = module.zero_point.to(torch.int32)
        theirs = (torch.from_numpy(codes.astype(np.int32)) - zero) * module.scale
        handed = self._handed(theirs, Step(name=name, ours=_steps(y, module), theirs=_steps(theirs, module)))
        self.same[id(module), id(args[0])] = self.last[id(module)] = handed
        self.kept.append(args[0])
        return handed

    def _instead(self, handed: torch.Tensor, y: torch.Tensor, quantizer: Any) -> torch.Tensor:
        """Compare what an integer kernel gives in the place of the quantizer before it."""
        step = self.taken.get(id(handed))
        if step is None:
            return y
        self.taken[id(handed)] = Step(name=step.name, ours=_steps(y, quantizer), theirs=step.theirs)
        return handed

    def _layer(self, layer: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        handed = self.last.get(id(layer.output))
        return y if handed is None else self._instead(handed, y, layer.output)

    def _dynamic(self, layer: DynamicLinear, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Compare the input of a layer that rounds at run time, and give the file's."""
        again = self.same.get((0, id(args[0])))
        if again is not None:
            return (again,)
        number = self.calls[0] = self.calls.get(0, -1) + 1
        calls = self.found.get(DYNAMIC, [])
        parts = calls[number] if number < len(calls) else []
        if len(parts) != 3 or parts[0].shape != args[0].shape:
            self.missed += 1
            return args
        codes, scale, zero = (np.asarray(part, np.float32) for part in parts)
        name = next(n for n, module in self.model.named_modules() if module is layer)
        ours = _numpy(dynamic_round(args[0])) / scale
        handed = self._handed(
            torch.from_numpy((codes - zero) * scale), Step(name=f"{name}.input", ours=ours, theirs=codes - zero)
        )
        self.same[0, id(args[0])] = handed
        self.kept.append(args[0])
        return (handed,)

    def _handed(self, theirs: torch.Tensor, step: Step) -> torch.Tensor:
        if self.noise is not None:
            theirs = disturbed(theirs, self.noise, self.size)
        self.taken[id(theirs)] = step
        self.kept.append(theirs)
        return theirs

    def place(self, name: str) -> str:
        """What a rounding is of, in the user's terms."""
        return name_of_value(self.model, name)

    def merged(self, wrong: Callable[[list[np.ndarray]], bool]) -> str:
        """The place of the first rounding that ONNX Runtime merges with others, and then computes something else."""
        tensor = self.file.first_merged(wrong)
        owners = [owner for owner, calls in self.file.values.items() if any(tensor in names for names in calls)]
        return self.place(owners[0]) if owners and owners[0] != DYNAMIC else "a rounding at run time"


def disturbed(x: torch.Tensor, noise: torch.Generator, size: float) -> torch.Tensor:
    """Return x with normal noise of `size` times its largest value added; integers as they are."""
    if not x.is_floating_point() or not x.numel():
        return x
    largest = float(torch.nan_to_num(x, posinf=0.0, neginf=0.0).abs().max()) or 1.0
    return x + torch.randn(x.shape, generator=noise) * (size * largest)


class File:
    """The dense file, run with the integers of roundings as outputs.

    Args:
        data: its bytes.
        values: where the integers are (`Roundings.values`).
        fed: its inputs.
    """

    def __init__(self, data: bytes, values: Mapping[str, list[list[str]]], fed: Fed) -> None:
        self.proto, self.values, self.fed = onnx.ModelProto.FromString(data), values, dict(fed)
        self.own = [output.name for output in self.proto.graph.output]
        asked = {name for calls in values.values() for names in calls for name in names}
        self.shown = [name for node in self.proto.graph.node for name in node.output if name in asked and name not in self.own]

    def run(self, shown: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the outputs and the named tensors, by name."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for name in shown:
            proto.graph.output.add().name = name
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        opened = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [*self.own, *shown]
        return dict(zip(names, map(np.asarray, opened.run(names, self.fed)), strict=True))

    def integers(self, results: Mapping[str, np.ndarray]) -> dict[str, list[list[np.ndarray]]]:
        """The integers of each rounding, as `values` lists them."""
        return {owner: [[results[n] for n in names if n in results] for names in calls] for owner, calls in self.values.items()}

    def first_merged(self, wrong: Callable[[list[np.ndarray]], bool]) -> str | None:
        """The first rounding that the runtime must not be shown for its outputs to go wrong: it was merged with others; its tensor.

        Args:
            wrong: says that outputs are not those of the graph; they are where every rounding is shown, and not where none is.
        """
        low, high = 0, len(self.shown)
        while high - low > 1:
            middle = (low + high) // 2
            results = self.run(self.shown[:middle])
            low, high = (middle, high) if wrong([results[name] for name in self.own]) else (low, middle)
        return self.shown[low] if self.shown else None


def _shaped(candidates: Sequence[np.ndarray], shape: Sequence[int], zero: int) -> np.ndarray | None:
    """The first of the tensors that has the shape, but for sizes of one and for channels of zeros that a pass added; None without one."""
    bare = [size for size in shape if size != 1]
    for codes in candidates:
        if [size for size in codes.shape if size != 1] == bare:
            return codes.reshape(tuple(shape))
    for codes in candidates:
        if codes.ndim == len(shape) > 2 and codes.shape[1] > shape[1]:
            narrow = codes[:, : shape[1]]
            if narrow.shape == tuple(shape) and bool((codes[:, shape[1] :] == zero).all()):
                return narrow
    return None


def _steps(x: torch.Tensor, quantizer: Any) -> np.ndarray:
    return _numpy(x) / float(quantizer.scale)


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
