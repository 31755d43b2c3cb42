"""How like the original a compressed file answers: signal to noise of every output, and the share of equal answers.

    SQNR = 10 · log10(Var(y) / mean((ŷ − y)²))   in dB, of the output where it is least

An answer is the index of the largest entry along the last axis (of pictures, along the channels) of the first output that has several;
a file without such an output has no agreement. What was compared is said: the user's inputs, or random ones, on which a figure means less.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torchopt.errors import DataError
from torchopt.runtime import session
from torchopt.runtime.inputs import Asked, feed_of, run, shape_of

RANDOM_RUNS = 8
CEILING = 120.0  # dB that stand for "no difference"
Batch = Mapping[str, np.ndarray]
Pairs = Sequence[tuple[list[np.ndarray], list[np.ndarray]]]


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """The comparison of two files.

    Attributes:
        sqnr_db: signal to noise of the output where it is least, at most 120; None where no output is of floating point.
        agreement: share of equal answers, 0 … 1, or None.
        samples: rows compared.
        inputs: "given", "random", or what else is said of them.
    """

    sqnr_db: float | None
    agreement: float | None
    samples: int
    inputs: str

    def __str__(self) -> str:
        parts = [] if self.sqnr_db is None else [f"{self.sqnr_db:.1f} dB"]
        parts += [] if self.agreement is None else [f"{self.agreement:.1%} of the answers equal"]
        return f"{', '.join(parts) or 'no output to compare'} ({self.samples} {self.inputs} samples)"


def likeness(
    original: str | os.PathLike[str], small: str | os.PathLike[str], batches: Sequence[Batch] | None, asked: Asked | None
) -> Likeness:
    """Run both files on the same inputs and compare them.

    Args:
        original: the file that counts as right.
        small: the other.
        batches: inputs by name; None draws random ones.
        asked: the shapes of random inputs whose sizes the file leaves free.

    Raises:
        DataError: a file does not run on them, or gives outputs of other shapes.
        ConfigError: a free size is not given.
    """
    a, b = session(original), session(small)
    feeds = [
        feed_of(a, str(original), inputs=asked if batches is None else batches[i], batch=2, seed=i)
        for i in range(RANDOM_RUNS if batches is None else len(batches))
    ]
    pairs = [(run(a, feed, str(original)), run(b, feed, str(small))) for feed in feeds]
    samples = sum(max((shape_of(value)[0][0] for value in feed.values() if shape_of(value)[0]), default=1) for feed in feeds)
    return liken(pairs, str(small), samples=samples, inputs="random" if batches is None else "given")


def liken(pairs: Pairs, where: str, *, samples: int, inputs: str) -> Likeness:
    """Compare outputs that are there already.

    Args:
        pairs: for each batch all outputs of the original, and of the other.
        where: the other, for messages.
        samples: rows compared.
        inputs: what they were.

    Raises:
        DataError: the outputs are of other shapes.

    Example:
        >>> y = np.eye(3, dtype=np.float32)
        >>> str(liken([([y], [y * 0.9])], "m.onnx", samples=3, inputs="given"))
        '18.2 dB, 100.0% of the answers equal (3 given samples)'
    """
    columns = [(_flat(ys), _flat(zs)) for ys, zs in _columns(pairs, where)]
    noise = [_decibels(y, z) for y, z in columns if y.dtype.kind == "f"]
    return Likeness(sqnr_db=min(noise, default=None), agreement=_agreement(pairs), samples=samples, inputs=inputs)


def _columns(pairs: Pairs, where: str) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    for ours, theirs in pairs:
        shapes = [np.shape(y) for y in ours], [np.shape(z) for z in theirs]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{where}: gives outputs of the shapes {shapes[1]}, and the original {shapes[0]}; the files do not match"
            )
    numbers = range(len(pairs[0][0])) if pairs else ()
    return [([y[i] for y, _ in pairs], [z[i] for _, z in pairs]) for i in numbers]


def _flat(values: list[np.ndarray]) -> np.ndarray:
    arrays = [np.asarray(v).reshape(-1) for v in values]
    joined = np.concatenate(arrays) if arrays else np.empty(0, np.float32)
    return joined.astype(np.float64) if joined.dtype.kind == "f" else joined


def _decibels(original: np.ndarray, small: np.ndarray) -> float:
    same = (original == small) | (np.isnan(original) & np.isnan(small))  # infinities of a mask, too
    noise = float(np.square(np.where(same, 0.0, small - original)).mean()) if original.size else 0.0
    signal = float(original[np.isfinite(original)].var()) if np.isfinite(original).any() else 0.0
    if noise == 0:
        return CEILING
    return float(min(CEILING, 10 * np.log10(signal / noise))) if np.isfinite(noise) and signal > 0 else -CEILING


def _agreement(pairs: Pairs) -> float | None:
    """The share of equal answers."""
    first = next((i for i, y in enumerate(pairs[0][0]) if np.ndim(y) > 1 and y.shape[_axis(y)] > 1 and y.dtype.kind == "f"), None)
    if first is None:
        return None
    answers = [(ours[first].argmax(_axis(ours[first])), theirs[first].argmax(_axis(ours[first]))) for ours, theirs in pairs]
    return float(np.concatenate([(y == z).reshape(-1) for y, z in answers]).mean())


def _axis(output: np.ndarray) -> int:
    """Where the classes are: the channels of pictures and volumes, else the last axis."""
    return 1 if np.ndim(output) > 3 else -1
