"""Pools and means, of integers and of floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from torchopt.c_code.lower import Lowering, Operator
from torchopt.c_code.operators.grids import before, grid, windows
from torchopt.c_code.program import Value


def max_pool(lowering: Lowering, node: onnx.NodeProto) -> None:
    """MaxPool of floats or integers."""
    if len(node.output) > 1 and node.output[1]:
        raise lowering.error("gives the places of its results too; only the results have a form in C")
    value = lowering.last(lowering.input(0))
    place = _place(lowering, value)
    size = np.dtype(value.dtype).itemsize * value.shape[1]
    fields = place | {"channels": value.shape[1]}
    lowering.step("max_pool", [value], lowering.output(True), fields, overlap={0: before(place, size, size)})


def mean_pool(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearAveragePool: x, scale, zero, scale, zero."""
    value = lowering.last(lowering.input(0))
    reads, writes = grid(lowering, 1, value.dtype), grid(lowering, 3, value.dtype)
    fields, distance = _mean(lowering, value)
    fields |= {"in_scale": reads.scale, "out_scale": writes.scale, "in_zero": reads.zero, "out_zero": np.float32(writes.zero)}
    lowering.step("mean_pool", [value], lowering.output(True), fields | writes.limits, overlap={0: distance})


def float_mean_pool(lowering: Lowering, node: onnx.NodeProto) -> None:
    """AveragePool of floats."""
    value = lowering.last(lowering.input(0))
    fields, distance = _mean(lowering, value)
    lowering.step("float_mean_pool", [value], lowering.output(True), fields, overlap={0: distance})


def global_mean(lowering: Lowering, node: onnx.NodeProto) -> None:
    """QLinearGlobalAveragePool: x, scale, zero, scale, zero."""
    if lowering.attribute("channels_last", 0):
        raise lowering.error("has its channels last; ONNX's own order is needed")
    value = lowering.last(lowering.input(0))
    _one_sample(lowering, value)
    reads, writes = grid(lowering, 1, value.dtype), grid(lowering, 3, value.dtype)
    ratio = reads.scale / np.float32(writes.scale * np.float32(value.pixels))
    fields: dict[str, Any] = {"channels": value.shape[1], "pixels": value.pixels, "in_zero": reads.zero, "ratio": ratio}
    fields |= {"out_zero": writes.zero} | writes.ends
    lowering.step("global_mean", [value], lowering.output(True), fields)


def float_global_mean(lowering: Lowering, node: onnx.NodeProto) -> None:
    """GlobalAveragePool of floats."""
    value = lowering.last(lowering.input(0))
    _one_sample(lowering, value)
    fields = {"outer": 1, "size": value.pixels, "step": value.shape[1]}
    lowering.step("float_mean", [value], lowering.output(True), fields)


def float_mean(lowering: Lowering, node: onnx.NodeProto) -> None:
    """ReduceMean of floats over dimensions that stand side by side."""
    value = lowering.input(0)
    rank = len(value.shape)
    given = lowering.attribute("axes") if len(node.input) < 2 else lowering.constant(1, "dimensions").tolist()
    axes = sorted(axis % rank for axis in (given or range(rank)))
    if axes == list(range(2, rank)) and value.channels_last and value.shape[0] == 1:
        fields = {"outer": 1, "size": value.pixels, "step": value.shape[1]}
    else:
        if axes != list(range(axes[0], axes[-1] + 1)):
            raise lowering.error(f"goes over the dimensions {axes}; neighbours are needed")
        value = lowering.plain(value)
        size = math.prod(value.shape[axes[0] : axes[-1] + 1])
        fields = {"outer": math.prod(value.shape[: axes[0]]), "size": size, "step": math.prod(value.shape[axes[-1] + 1 :])}
    lowering.step("float_mean", [value], lowering.output(), fields)


def _place(lowering: Lowering, value: Value) -> dict[str, int]:
    kernel = list(lowering.attribute("kernel_shape"))
    return windows(lowering, value, (kernel[0] if len(kernel) > 1 else 1, kernel[-1]))


def _mean(lowering: Lowering, value: Value) -> tuple[dict[str, Any], int]:
    place = _place(lowering, value)
    whole = bool(lowering.attribute("count_include_pad", 0))
    if lowering.attribute("ceil_mode", 0) and whole:
        raise lowering.error(
            "counts padding in windows that leave it (ceil_mode with count_include_pad); one of the two is needed"
        )
    if place.pop("dilation_y") != 1 or place.pop("dilation_x") != 1 or lowering.attribute("channels_last", 0):
        raise lowering.error("has dilations, or channels last; ONNX's own order without dilations is needed")
    size = np.dtype(value.dtype).itemsize * value.shape[1]
    return place | {"channels": value.shape[1], "whole": int(whole)}, before(place, size, size)


def _one_sample(lowering: Lowering, value: Value) -> None:
    if value.shape[0] != 1:
        raise lowering.error(f"reads {value.shape[0]} samples; C code takes one at a time")


OPERATORS: dict[str, Operator] = {
    "MaxPool": max_pool,
    "QLinearAveragePool": mean_pool,
    "AveragePool": float_mean_pool,
    "QLinearGlobalAveragePool": global_mean,
    "GlobalAveragePool": float_global_mean,
    "ReduceMean": float_mean,
}
