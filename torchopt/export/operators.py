"""Operators of torch that its exporter writes as something else, written as they are.

1. average pools with `divisor_override`: the exporter drops it; the mean over whole windows, padding included, times their size over the
   divisor
2. `amax()` and `amin()` over everything: the exporter asks for an axis
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript.values import Op, Opset

from torchopt.errors import ModelError


def operators(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what the exporter is to write for each operator of this file, in an operator set."""
    aten = torch.ops.aten
    pools = {aten.avg_pool2d.default: _average_pool(opset, 2), aten.avg_pool3d.default: _average_pool(opset, 3)}
    return pools | {aten.amax.default: _extreme(opset, "ReduceMax"), aten.amin.default: _extreme(opset, "ReduceMin")}


def _extreme(opset: int, name: str) -> Callable[..., Any]:
    reduce = Op(Opset("", opset), name)

    def translation(x: Any, dim: Sequence[int] | int = (), keepdim: bool = False) -> Any:
        axes = [dim] if isinstance(dim, int) else list(dim)
        return reduce(x, axes, keepdims=int(keepdim)) if axes else reduce(x, keepdims=int(keepdim))

    return translation


def _average_pool(opset: int, rank: int) -> Callable[..., Any]:
    pool, times = (Op(Opset("", opset), name) for name in ("AveragePool", "Mul"))

    def translation(
        x: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        kernel, pads = _sizes(kernel_size, rank), _sizes(padding, rank)
        if divisor_override is not None and ceil_mode:
            raise ModelError(
                f"AvgPool{rank}d with divisor_override and ceil_mode has no form in ONNX; pad the input, without ceil_mode"
            )
        mean = pool(
            x,
            kernel_shape=kernel,
            strides=_sizes(stride, rank) if stride else kernel,
            pads=pads * 2,
            ceil_mode=int(ceil_mode),
            count_include_pad=int(count_include_pad or divisor_override is not None),
        )
        return mean if divisor_override is None else times(mean, math.prod(kernel) / divisor_override)

    return translation


def _sizes(given: Sequence[int] | int, rank: int) -> list[int]:
    """One number a dimension."""
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * rank if len(sizes) == 1 else sizes
