"""Integer activations for a file without source, by ONNX Runtime's own quantizer, with what it needs to do well on the CPU.

    static     uint8 activations with ranges from data, int8 weights per channel, QDQ form, after shape inference and batch-norm folding
    dynamic    ranges found at each run; int8 weights per channel of constant matrices

The quantizer is the best one kept for ONNX files. What is ours: the data are checked before, and the result is packed, compared and timed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchopt.errors import ConfigError, DataError, FileError, ModelError, nearest
from torchopt.runtime import session

BATCH = 16  # rows of a calibration batch, where the file takes any number
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
Batch = dict[str, np.ndarray]
Data = str | os.PathLike[str] | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]]


def read_batches(data: Data, model: str | os.PathLike[str]) -> list[Batch]:
    """Return calibration data as batches that the model takes.

    Args:
        data: an .npz file or a mapping with one array an input, rows along the first axis; or batches, each such a mapping.
        model: the ONNX file.

    Raises:
        FileError: the file is missing or no .npz file.
        DataError: an input is missing, unknown, of another number of rows, or there are no rows.
    """
    if isinstance(data, (str, os.PathLike)):
        data = _loaded(Path(data))
    if isinstance(data, Mapping):
        return _cut({str(name): np.asarray(array) for name, array in data.items()}, model)
    batches = [{str(name): np.asarray(array) for name, array in batch.items()} for batch in data]
    for batch in batches:
        _check_names(batch, model)
    if not batches:
        raise DataError("compress: calibration has no batch; give some hundred samples")
    return batches


def quantize_static(source: Path, target: Path, batches: Sequence[Batch], method: str) -> None:
    """Write `source` with integer activations and weights, calibrated on `batches`.

    Raises:
        ConfigError: an unknown method.
        ModelError: the quantizer does not take the file.
    """
    from onnxruntime import quantization

    if method not in METHODS:
        raise ConfigError(f"compress: method={method!r}; one of {', '.join(METHODS)} is needed{nearest(method, METHODS)}")
    prepared = target.with_name("prepared.onnx")
    with _quiet(), _refused(source):
        quantization.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            *(str(prepared), str(target), _reader(quantization, batches)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, METHODS[method]),
        )


def quantize_dynamic(source: Path, target: Path) -> None:
    """Write `source` with integer weights, and activations that are quantized at each run.

    Raises:
        ModelError: the quantizer does not take the file.
    """
    from onnxruntime import quantization

    with _quiet(), _refused(source):
        quantization.quantize_dynamic(str(source), str(target), per_channel=True, weight_type=quantization.QuantType.QInt8)


def _loaded(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileError(f"{path}: there is no such file; give an .npz file with one array an input")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, AttributeError) as error:
        raise FileError(f"{path}: is no .npz file of plain arrays ({error}); numpy.savez writes one") from error


def _check_names(batch: Mapping[str, np.ndarray], model: str | os.PathLike[str]) -> None:
    wanted = [spec.name for spec in session(model).get_inputs()]
    for name in batch:
        if name not in wanted:
            raise DataError(f"compress: {model} has no input {name!r}; it has {', '.join(wanted)}{nearest(name, wanted)}")
    missing = [name for name in wanted if name not in batch]
    if missing:
        raise DataError(f"compress: calibration has no array for the input {missing[0]!r} of {model}; give one for each input")


def _cut(arrays: Batch, model: str | os.PathLike[str]) -> list[Batch]:
    """Rows in batches: of the size that the file fixes, else of at most 16."""
    _check_names(arrays, model)
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    rows = min(counts.values(), default=0)
    if len(set(counts.values())) > 1:
        raise DataError(f"compress: calibration has {counts} rows; every input needs the same number")
    fixed = {spec.shape[0] for spec in session(model).get_inputs() if spec.shape and isinstance(spec.shape[0], int)}
    size = next(iter(fixed), BATCH)
    whole = [slice(start, start + size) for start in range(0, rows, size) if not fixed or start + size <= rows]
    if not whole:
        raise DataError(f"compress: calibration has {rows} rows, and {model} takes {size} at a time; give some hundred samples")
    return [{name: array[part] for name, array in arrays.items()} for part in whole]


def _reader(quantization: Any, batches: Sequence[Batch]) -> Any:
    """The batches as ORT's quantizer asks for them."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Batch | None:
            return next(self.left, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer talks to the root logger; its advice is followed already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _refused(source: Path) -> Iterator[None]:
    """Whatever the quantizer stumbles over is one sentence."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or repr(error)
        raise ModelError(
            f"compress: ONNX Runtime's quantizer does not take {source.name}: {reason}; activations='float' rounds weights only"
        ) from error
