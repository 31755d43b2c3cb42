"""What ONNX Runtime really runs: which layers are integer kernels, which stayed float and why, what packing left to run.

The session writes the graph that it optimized to a temporary file; its node types are the truth (`kernels`). Layers are those of the
file, wherever they stand in it (`found`), and why one is float is told by what the file lacks (`reasons`).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from torchopt.onnx_file.read import read
from torchopt.onnx_file.view import View
from torchopt.pack.pack import check_calls
from torchopt.runtime.found import Found, layers
from torchopt.runtime.kernels import Kernel, Ran, ran
from torchopt.runtime.reasons import reason

JOINED = {"Attention", "QAttention", "MultiHeadAttention"}  # what the runtime joins from several layers


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution, matrix product or recurrent layer: its weight's name, its kernel in ORT, whether that is integer, and why not."""

    name: str
    kernel: str
    integer: bool
    reason: str
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each layer of a file runs.

    Attributes:
        layers: a row for each weight of a convolution, a matrix product or a recurrent layer; weights in branches, bodies and functions
            are named with the scope that they stand in.
        kernels: how often each node type occurs in the optimized graph, in its subgraphs too.
        undecoded: node types of packed weights that run at each inference (none where the runtime folds them).
    """

    layers: list[Layer]
    kernels: dict[str, int]
    undecoded: list[str]

    @property
    def integer(self) -> list[str]:
        """Names of the layers that run as integers."""
        return [layer.name for layer in self.layers if layer.integer]

    @property
    def float(self) -> list[str]:
        """Names of the layers that run in float."""
        return [layer.name for layer in self.layers if not layer.integer]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"integer": self.integer, "float": self.float, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{len(self.integer)} of {len(self.layers)} layers run as integers in ONNX Runtime"]
        if not self.layers:
            lines = ["no convolution, matrix product or recurrent layer with weights is in this file"]
        lines += [f"  float: {layer.name} ({layer.kernel}): {layer.reason}" for layer in self.layers if not layer.integer]
        if self.undecoded:
            lines.append(f"  packed weights are decoded at each inference: {', '.join(self.undecoded)}")
        lines.append("  " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.kernels.items(), key=lambda x: -x[1])))
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Placement:
    """Open the file in ONNX Runtime and report how its layers run.

    Raises:
        FileError: the file is missing, damaged, or refused.
    """
    model = read(path)
    check_calls(model, str(path))
    view = View(model)
    found, became = layers(view), ran(path, model, view)
    rows = [_layer(layer, _kernels(layer, became), view) for layer in found]
    return Placement(layers=rows, kernels=dict(became.kinds), undecoded=became.undecoded)


def _kernels(layer: Found, became: Ran) -> list[Kernel]:
    """What a layer became; attention that the runtime joins from several layers is no longer called after any of them."""
    own = became.by_node.get(id(layer.node), [])
    return own or [kernel for kernel in became.unknown if kernel.kind in JOINED and "Conv" not in layer.node.op_type][:1]


def _layer(layer: Found, kernels: list[Kernel], view: View) -> Layer:
    """A row; a layer of a function runs as integers where all calls do."""
    integer = bool(kernels) and all(kernel.integer for kernel in kernels)
    shown = next((k for k in kernels if k.integer is integer), None)
    return Layer(
        name=layer.name,
        kernel=shown.kind if shown is not None else "none",
        integer=integer,
        reason="" if integer else reason(layer, kernels, view),
        weight_bytes=layer.weight.stored_bytes if layer.weight is not None else 0,
    )
