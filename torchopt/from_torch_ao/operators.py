"""Operators on quantized tensors (`torch.ops.quantized.*`) as what they compute on floats, before the result is rounded.

The arguments that say how to round (scale, zero point) come last, and are left out: the value itself tells its grid.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Function = Callable[..., Any]
FLOAT: dict[str, tuple[Function, int]] = {  # name → what it computes, how many arguments that takes
    "add": (operator.add, 2),
    "add_scalar": (operator.add, 2),
    "mul": (operator.mul, 2),
    "mul_scalar": (operator.mul, 2),
    "matmul": (torch.matmul, 2),
    "cat": (torch.cat, 2),
    "hardswish": (F.hardswish, 1),
    "sigmoid": (torch.sigmoid, 1),
    "leaky_relu": (F.leaky_relu, 2),
    "softmax": (F.softmax, 2),
    "layer_norm": (F.layer_norm, 5),
    "group_norm": (F.group_norm, 5),
}
MOVES = {  # each element of the result is an element of the first argument: nothing is rounded anew
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "unsqueeze", "squeeze", "getitem", "chunk", "split", "unbind",
    "expand", "repeat", "t", "clone", "detach", "to", "Flatten", "Unflatten", "Identity", "Dropout", "Dropout2d",
}  # fmt: skip


def float_of(name: str) -> tuple[Function, int, bool] | None:
    """Return what `torch.ops.quantized.<name>` computes: a function of floats, its number of arguments, and whether a ReLU follows.

    Example:
        >>> float_of("add_relu")[1:]
        (2, True)
    """
    plain, relu = name.removesuffix(".default"), False
    plain = plain.removesuffix(".Scalar").removesuffix("_out")
    if plain.endswith("_relu") and plain != "leaky_relu":
        plain, relu = plain.removesuffix("_relu"), True
    found = FLOAT.get(plain)
    return None if found is None else (*found, relu)
