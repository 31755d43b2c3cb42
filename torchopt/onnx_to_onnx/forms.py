"""One weight in fewer bits, and what stands in the graph for it: operators that ONNX Runtime computes once, when it loads the file.

    int8        ŵ = s · q        q of 8 bits, s one number along the axis that leaves the least error
    int4        ŵ = s · q        q of 4 bits, s one float16 number for each 32 neighbours (or along an axis, where 32 do not fit)
    float16     ŵ = float16(w)
    shared      ŵ = T[c]         T the best K values (k-means on a line); the packed file holds codes and table

Zeros stay zeros in all of them, and the layer computes in float32 as before: these forms save bytes, not time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torchopt.cluster.tables.kmeans import kmeans

BLOCK = 32  # neighbours that share a scale in four bits
GAIN = 0.5  # dB by which more scales must be better to be taken
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the largest entry: where a scale of few bits may clip
LARGEST_HALF = 65504.0
FEW_BITS = 6  # up to here clipping is tried


@dataclass(frozen=True, kw_only=True)
class Form:
    """A weight in another form.

    Attributes:
        kind: "int8", "int4", "float16" or "shared".
        codes: int8 for "int8" and "int4", float16, or float32 values of which few are distinct; in the weight's shape, or in blocks.
        scale: what codes are multiplied with, broadcast; None where they are the values.
        value: what the runtime will compute with, float32, in the weight's shape.
    """

    kind: str
    codes: np.ndarray
    scale: np.ndarray | None
    value: np.ndarray


def rounded(weight: np.ndarray, kind: str, clusters: int = 0) -> Form | None:
    """Return a weight in the form asked for, or None where it has none.

    Args:
        weight: float32, any shape.
        kind: "int8", "int4", "float16" or "shared".
        clusters: of "shared", 2 to 256.

    Example:
        >>> w = np.array([[1.0, 0.0], [-0.5, 0.25]], np.float32)
        >>> rounded(w, "float16").value.tolist()
        [[1.0, 0.0], [-0.5, 0.25]]
        >>> rounded(w, "shared", clusters=3).value.tolist()
        [[1.0, 0.0], [-0.5, 0.0]]
    """
    if kind == "float16":
        return _half(weight)
    if kind == "shared":
        return _shared(weight, clusters)
    return _integers(weight, 8 if kind == "int8" else 4)


def _half(weight: np.ndarray) -> Form | None:
    if np.abs(weight).max(initial=0) > LARGEST_HALF:
        return None
    codes = weight.astype(np.float16)
    return Form(kind="float16", codes=codes, scale=None, value=codes.astype(np.float32))


def _shared(weight: np.ndarray, clusters: int) -> Form:
    table = kmeans(weight, clusters, pin_zero=bool((weight == 0).any())).astype(np.float32)
    borders = (table[1:].astype(np.float64) + table[:-1]) / 2
    value = table[np.searchsorted(borders, weight)]
    value[weight == 0] = 0.0
    return Form(kind="shared", codes=value, scale=None, value=value)


def _integers(weight: np.ndarray, bits: int) -> Form:
    if bits <= 4 and weight.size % BLOCK == 0:
        return _on_grid(weight, weight.reshape(-1, BLOCK), (1,), bits, np.float16)
    axes: list[tuple[int, ...]] = [()]
    axes += [
        (axis,) for axis in sorted(range(weight.ndim), key=lambda a: weight.shape[a]) if 1 < weight.shape[axis] < weight.size
    ]
    best, least = None, math.inf
    for kept in axes:  # fewest scales first
        over = tuple(axis for axis in range(weight.ndim) if axis not in kept)
        form = _on_grid(weight, weight, over, bits, np.float32)
        error = float(np.square(form.value - weight, dtype=np.float64).sum())
        if best is None or error < least * 10 ** (-GAIN / 10):
            best, least = form, error
    assert best is not None
    return best


def _on_grid(weight: np.ndarray, rows: np.ndarray, over: tuple[int, ...], bits: int, dtype: type) -> Form:
    """The nearest points of symmetric grids, one for each place that `over` leaves."""
    most = 2 ** (bits - 1) - 1
    largest = np.abs(rows).max(axis=over, keepdims=True)
    best: tuple[np.ndarray, np.ndarray] | None = None
    least = np.full(largest.shape, np.inf)
    for share in SHRINKS if bits <= FEW_BITS else (1.0,):
        scale = _positive(largest * np.float32(share / most), dtype)
        codes = np.clip(np.rint(rows / scale.astype(np.float32)), -most, most).astype(np.int8)
        error = np.square(codes * scale.astype(np.float32) - rows, dtype=np.float64).sum(axis=over, keepdims=True)
        if best is None:
            best, least = (scale, codes), error
        else:
            better = error < least
            best = np.where(better, scale, best[0]), np.where(better, codes, best[1])
            least = np.minimum(error, least)
    assert best is not None
    scale, codes = best
    value = (codes.astype(np.float32) * scale.astype(np.float32)).reshape(weight.shape)
    return Form(kind=f"int{bits}", codes=codes, scale=scale, value=value)


def _positive(scale: np.ndarray, dtype: type) -> np.ndarray:
    """The scale as it is stored: no zero, which would divide, and nothing that its type rounds to one."""
    stored = np.minimum(scale, LARGEST_HALF).astype(dtype) if dtype is np.float16 else scale.astype(dtype)
    stored[stored == 0] = np.finfo(dtype).tiny
    return stored
