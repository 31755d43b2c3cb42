"""Bytes that a weight takes in a packed file, by the codecs' own sizes; nothing is written.

A tensor's own bytes are its encoding and its call. What decodes it is shared: functions, each once in the file, however many tensors
are of its kind. So an option is (own bytes, the functions it needs), and who adds options up counts each function once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from torchopt.codecs import CALL_BYTES, encodings
from torchopt.network.grid import grids
from torchopt.pack.choose import SMALL
from torchopt.pack.decoders import decodable, function_bytes
from torchopt.pack.packable import SMALLEST

OPSET = 21  # that packed files are written in


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one weight takes: bytes of its own, and bytes of the functions that decode it, by name."""

    own: int
    shared: dict[str, int] = field(default_factory=dict)


def sizes(model: nn.Module, name: str) -> list[Size]:
    """Return what a weight of a plain model may take, in each form that the packer may choose from; the dense one is among them.

    Args:
        model: finalized; a weight with a recorded grid is counted in its integers, with the scales of its channels.
        name: of the weight.

    Example:
        >>> [size.own for size in sizes(nn.Linear(100, 10), "weight")]
        [4000]
    """
    value, grid = model.get_parameter(name).detach(), grids(model).get(name)
    array = value.cpu().numpy() if grid is None else grid.codes(value).cpu().numpy()
    scales = 0 if grid is None else 4 * grid.scale.numel()
    found = [Size(own=array.nbytes + scales)]
    if array.nbytes <= SMALLEST:
        return found
    for encoding in encodings(np.ascontiguousarray(array)):
        if decodable(encoding, OPSET):
            found.append(Size(own=encoding.payload_bytes + CALL_BYTES + scales, shared=function_bytes(encoding, OPSET)))
    if array.nbytes >= SMALL:  # a large tensor takes its smallest, whatever decodes it
        found = [min(found, key=lambda size: size.own)]
    return found


def total(chosen: Iterable[Size]) -> int:
    """Return the bytes of several weights together: each function once.

    Example:
        >>> total([Size(own=10, shared={"a": 5}), Size(own=20, shared={"a": 5})])
        35
    """
    listed = list(chosen)
    shared: Mapping[str, int] = {name: size for one in listed for name, size in one.shared.items()}
    return sum(one.own for one in listed) + sum(shared.values())


def pareto(found: Iterable[Size]) -> list[Size]:
    """Leave out forms that are larger than another which needs no function that they do not."""
    listed = sorted(found, key=lambda size: (size.own, len(size.shared)))
    return [one for i, one in enumerate(listed) if not any(other.shared.keys() <= one.shared.keys() for other in listed[:i])]
