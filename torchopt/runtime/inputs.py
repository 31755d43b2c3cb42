"""What a file is run on: the shape and type of each input, from what the file says and from what is asked for.

A file may leave sizes free. A free first axis is the batch, and small. Any other free size (height, width, time) decides what
is computed, so nobody may choose it but the user: `--input NAME:1,3,320,320[:DTYPE]` on the command line, `inputs={"x": (1, 3, 320, 320)}`
in Python. Without it the file is refused. Values are random: normal numbers, and 0 or 1 where they are whole, since these may be indices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto

from torchopt.errors import ConfigError, DataError, FileError, nearest

Feed = dict[str, Any]  # by the input's name: an array, or ORT's own value for types that numpy has not

TYPES: dict[str, tuple[str, Any]] = {  # ORT's name of a type: ours, and numpy's
    "tensor(float)": ("float32", np.float32),
    "tensor(double)": ("float64", np.float64),
    "tensor(float16)": ("float16", np.float16),
    "tensor(bfloat16)": ("bfloat16", None),
    "tensor(bool)": ("bool", np.bool_),
    "tensor(string)": ("string", np.object_),
    **{f"tensor({kind})": (kind, np.dtype(kind).type) for kind in ("int8", "int16", "int32", "int64")},
    **{f"tensor(u{kind})": (f"u{kind}", np.dtype(f"u{kind}").type) for kind in ("int8", "int16", "int32", "int64")},
}
SPELLING = re.compile(r"(?P<name>.+):(?P<shape>\d+(?:,\d+)*)?(?::(?P<dtype>[A-Za-z]\w*))?")  # a name may hold colons too
PICTURE, LENGTH = 224, 128  # what an example says for a free size: of a picture, of anything else


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """The shape that one input shall have, and its type, such as "float32"; None is the file's."""

    shape: tuple[int, ...]
    dtype: str | None = None


Asked = Mapping[str, InputShape | Sequence[int] | np.ndarray]


def parse_inputs(texts: Sequence[str]) -> dict[str, InputShape]:
    """Read `NAME:1,3,320,320[:DTYPE]`, the spelling of every command that runs a file.

    Raises:
        ConfigError: another spelling, or a name that is given twice.

    Example:
        >>> parse_inputs(["x:1,3,320,320", "ids:0:1,16:int64"])["ids:0"]
        InputShape(shape=(1, 16), dtype='int64')
    """
    found: dict[str, InputShape] = {}
    for text in texts:
        match = SPELLING.fullmatch(text)
        if match is None or not (match["shape"] or match["dtype"]):
            raise ConfigError(f"--input: got {text!r}; NAME:SIZE,SIZE,… is needed, such as x:1,3,320,320 or ids:1,16:int64")
        if match["name"] in found:
            raise ConfigError(f"--input: {match['name']} is given twice; give each input once")
        shape = tuple(int(size) for size in match["shape"].split(",")) if match["shape"] else ()
        found[match["name"]] = InputShape(shape=shape, dtype=match["dtype"])
    return found


def feed_of(
    opened: onnxruntime.InferenceSession, where: str, *, inputs: Asked | None = None, batch: int = 1, seed: int = 0
) -> Feed:
    """Return what a session is run on: what is asked for, else random values of the shapes and types that the file names.

    Args:
        opened: the session.
        where: the file, for messages.
        inputs: a shape or an array for each input that needs one; names that the file has not are passed over.
        batch: the size of a free first axis.
        seed: of the random values.

    Raises:
        ConfigError: a size is free and not given, or what is given does not fit the file.
        FileError: an input is of a type that cannot be fed.
    """
    rng, specs, given = np.random.default_rng(seed), opened.get_inputs(), inputs or {}
    batches = {spec.shape[0] for spec in specs if len(spec.shape) > 1 and not _fixed(spec.shape[0])}
    batches -= {size for spec in specs for size in spec.shape[1:] if size is not None}  # a size named elsewhere is no batch
    unknown = [spec for spec in specs if spec.name not in given and None in _shape(spec, batch, batches)]
    if unknown:
        raise ConfigError(_refusal(where, unknown, batch, batches))
    return {spec.name: _value(spec, given.get(spec.name), _shape(spec, batch, batches), rng, where) for spec in specs}


def check_names(inputs: Asked | None, sessions: Sequence[onnxruntime.InferenceSession], where: str) -> None:
    """Refuse names that none of the files has.

    Raises:
        ConfigError: there is such a name.
    """
    known = list(dict.fromkeys(spec.name for opened in sessions for spec in opened.get_inputs()))
    for name in inputs or {}:
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(f"{where}: no file has an input {name!r}; the inputs are {', '.join(known) or 'none'}{near}")


def run(opened: onnxruntime.InferenceSession, feed: Feed, where: str) -> list[Any]:
    """Run a session once and return all outputs; what the runtime cannot do is one sentence.

    Raises:
        DataError: the runtime does not run the file on these inputs.
    """
    try:
        return call(opened, feed)
    except Exception as error:  # the runtime's exceptions share no class
        given = ", ".join(f"{name} {describe(value)}" for name, value in feed.items()) or "no input"
        raise DataError(f"{where}: ONNX Runtime does not run it on {given}: {first_line(error)}") from error


def call(opened: onnxruntime.InferenceSession, feed: Feed) -> list[Any]:
    """Run a session once; values that numpy has no type for stay the runtime's."""
    if not foreign(opened):
        return list(opened.run(None, feed))
    made = onnxruntime.OrtValue.ortvalue_from_numpy
    values = {name: made(value) if isinstance(value, np.ndarray) else value for name, value in feed.items()}
    return list(opened.run_with_ort_values(None, values))


def foreign(opened: onnxruntime.InferenceSession) -> bool:
    """True where an input or output is of a type that numpy has not."""
    return any(TYPES.get(spec.type, ("", 0))[1] is None for spec in (*opened.get_inputs(), *opened.get_outputs()))


def describe(value: Any) -> str:
    """Return the shape and type of an input as text.

    Example:
        >>> describe(np.zeros((1, 3, 8, 8), np.float32))
        '1×3×8×8 float32'
    """
    shape, dtype = shape_of(value)
    return f"{'×'.join(map(str, shape)) or 'scalar'} {dtype}"


def shape_of(value: Any) -> tuple[tuple[int, ...], str]:
    """Return the shape of an input, and the name of its type."""
    if isinstance(value, onnxruntime.OrtValue):
        return tuple(value.shape()), TYPES[value.data_type()][0]
    return tuple(value.shape), "string" if value.dtype.kind in "OU" else str(value.dtype)


def first_line(error: Exception) -> str:
    """Return what the runtime says of a failure, on one line."""
    return " ".join(str(error).split())[:300] or repr(error)


def _fixed(size: Any) -> bool:
    return isinstance(size, int) and size > 0  # older exporters write 0 and −1 for what they do not know


def _shape(spec: onnxruntime.NodeArg, batch: int, batches: set[Any]) -> list[int | None]:
    """The sizes of an input; None where the file leaves one free that is no batch."""
    sizes: list[int | None] = [size if _fixed(size) else None for size in spec.shape]
    if sizes and sizes[0] is None and spec.shape[0] in batches:
        sizes[0] = batch
    return sizes


def _refusal(where: str, specs: Sequence[onnxruntime.NodeArg], batch: int, batches: set[Any]) -> str:
    free, spelled, written = [], [], []
    for spec in specs:
        sizes = _shape(spec, batch, batches)
        shown = ", ".join("?" if size in (None, 0) else str(size) for size in spec.shape)
        free.append(f"{spec.name} ({shown})")
        example = PICTURE if len(sizes) > 3 else LENGTH
        full = [example if size is None else size for size in sizes]
        spelled.append(f"--input {spec.name}:{','.join(map(str, full))}")
        written.append(f"{spec.name!r}: ({', '.join(map(str, full))}{',' if len(full) == 1 else ''})")
    return (
        f"{where}: leaves sizes free that decide what is computed: {', '.join(free)}; give them, such as {' '.join(spelled)} "
        f"(in Python inputs={{{', '.join(written)}}})"
    )


def _value(spec: onnxruntime.NodeArg, asked: Any, sizes: list[int | None], rng: np.random.Generator, where: str) -> Any:
    if spec.type not in TYPES:
        raise FileError(
            f"{where}: its input {spec.name} is of type {spec.type}, which cannot be fed; a tensor of numbers or strings is needed"
        )
    dtype = TYPES[spec.type][0]
    if asked is None:
        return _random(rng, [size or 0 for size in sizes], spec.type)
    if not isinstance(asked, (InputShape, np.ndarray)):
        asked = InputShape(shape=tuple(asked))
    shape, given = (asked.shape, asked.dtype) if isinstance(asked, InputShape) else shape_of(asked)
    if given is not None and given != dtype:
        raise ConfigError(f"{where}: its input {spec.name} is of type {dtype}, and {given} is given; give {dtype}")
    fits = len(shape) == len(spec.shape) and all(not _fixed(s) or s == n for s, n in zip(spec.shape, shape, strict=True))
    if not fits and spec.shape:  # a file without shapes looks like one of scalars
        shown = ", ".join("any" if not _fixed(size) else str(size) for size in spec.shape)
        raise ConfigError(
            f"{where}: its input {spec.name} has the shape ({shown}), and {','.join(map(str, shape)) or 'none'} is given"
        )
    return asked if isinstance(asked, np.ndarray) else _random(rng, shape, spec.type)


def _random(rng: np.random.Generator, shape: Sequence[int], kind: str) -> Any:
    dtype = TYPES[kind][1]
    if dtype is np.object_:
        return np.full(shape, "0", np.object_)
    if dtype is None:  # bfloat16 is the upper half of float32
        bits = (rng.standard_normal(shape).astype(np.float32).reshape(math.prod(shape)).view(np.uint32) >> 16).astype(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits.reshape(shape), TensorProto.BFLOAT16)
    if np.issubdtype(dtype, np.floating):
        return np.asarray(rng.standard_normal(shape), dtype)
    return np.asarray(rng.integers(0, 2, shape), dtype)
