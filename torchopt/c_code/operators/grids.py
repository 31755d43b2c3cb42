"""The grids of integer operators as ONNX Runtime's nodes name them, and where windows lie in a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchopt.c_code.lower import Lowering
from torchopt.c_code.program import Value


@dataclass(frozen=True, kw_only=True)
class Grid:
    """scale·(q − zero), q from qmin to qmax."""

    scale: np.float32
    zero: int
    qmin: int
    qmax: int

    @property
    def ends(self) -> dict[str, Any]:
        """The ends of a result before its zero point is added, as C's fields name them."""
        return {"low": np.float32(self.qmin - self.zero), "high": np.float32(self.qmax - self.zero)}

    @property
    def limits(self) -> dict[str, Any]:
        """The ends of a result with its zero point."""
        return {"low": self.qmin, "high": self.qmax}


def grid(lowering: Lowering, index: int, dtype: str) -> Grid:
    """Return the grid whose scale is the input `index` of the current node, and whose zero point is the next one."""
    limits = np.iinfo(dtype)
    scale, zero = lowering.scalar(index, "scales"), lowering.scalar(index + 1, "zero points")
    return Grid(scale=np.float32(scale), zero=int(zero), qmin=int(limits.min), qmax=int(limits.max))


def windows(lowering: Lowering, value: Value, kernel: tuple[int, int]) -> dict[str, int]:
    """Return where the windows of the current node lie, as C's fields name it; a signal is a picture of one line."""
    shape, out = value.shape, lowering.shape()
    if len(shape) not in (3, 4) or shape[0] != 1:
        raise lowering.error(f"reads values of shape {shape}; (1, channels, width) or (1, channels, height, width) is needed")
    lines = len(shape) - 2
    given = {name: list(lowering.attribute(name) or [1] * lines) for name in ("strides", "dilations")}
    pads = list(lowering.attribute("pads") or [0] * 2 * lines)
    auto = (lowering.attribute("auto_pad") or b"NOTSET").decode()
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        for k in range(lines):
            span = (kernel[2 - lines + k] - 1) * given["dilations"][k] + 1
            whole = max((out[2 + k] - 1) * given["strides"][k] + span - shape[2 + k], 0)
            pads[k] = whole // 2 if auto == "SAME_UPPER" else whole - whole // 2
    flat = lines == 1
    return {
        "in_height": 1 if flat else shape[2], "in_width": shape[-1],
        "out_height": 1 if flat else out[2], "out_width": out[-1],
        "kernel_height": kernel[0], "kernel_width": kernel[1],
        "stride_y": 1 if flat else given["strides"][0], "stride_x": given["strides"][-1],
        "dilation_y": 1 if flat else given["dilations"][0], "dilation_x": given["dilations"][-1],
        "pad_top": 0 if flat else pads[0], "pad_left": pads[lines - 1],
    }  # fmt: skip


def before(place: dict[str, int], into: int, out: int, *, at_once: int = 1) -> int:
    """Return by how many bytes a result must lie before what it is made from, line by line, to be written over it.

    Args:
        place: where the windows lie.
        into: bytes of one position that is read.
        out: bytes of one that is written.
        at_once: positions that are written together.
    """
    position = np.arange(place["out_height"] * place["out_width"])
    line, column = position // place["out_width"], position % place["out_width"]
    top = np.clip(line * place["stride_y"] - place["pad_top"], 0, place["in_height"])
    left = np.clip(column * place["stride_x"] - place["pad_left"], 0, place["in_width"])
    read = np.minimum.accumulate((top * place["in_width"] + left)[::-1])[
        ::-1
    ]  # the first that this position or a later one reads
    written = np.minimum(position // at_once * at_once + at_once, len(position))
    return max(0, int((written * out - read[position // at_once * at_once] * into).max()))


def outer_count_inner(whole: tuple[int, ...], part: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return how often, how many, and how many times in a row the elements of `part` stand beside those of `whole`; None if otherwise.

    Example:
        >>> outer_count_inner((1, 4, 4, 8), (8,)), outer_count_inner((2, 8, 4), (1, 8, 1)), outer_count_inner((2, 3), (2, 3))
        ((16, 8, 1), (2, 8, 4), (1, 6, 1))
    """
    if len(part) > len(whole):
        if math.prod(part[: len(part) - len(whole)]) != 1:
            return None
        part = part[len(part) - len(whole) :]
    part = (1,) * (len(whole) - len(part)) + part
    differing = [k for k in range(len(whole)) if part[k] != 1]
    if any(part[k] != whole[k] for k in differing):
        return None
    if not differing:
        return math.prod(whole), 1, 1
    first, last = differing[0], differing[-1] + 1
    if part[first:last] != whole[first:last]:
        return None
    return math.prod(whole[:first]), math.prod(part[first:last]), math.prod(whole[last:])
