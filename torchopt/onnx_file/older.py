"""Files of older operator sets, in which packed weights cannot be decoded, written in a newer one by onnx's own converter.

The converter knows each operator's changes, and sometimes gets one wrong. So its result is taken only where ONNX Runtime gives the same
bits for both files on random inputs, and where every tensor is still there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from onnx import numpy_helper

from torchopt.errors import ModelError

OLDEST = 7  # of which ONNX Runtime promises to run files
REMEDY = "export it again with opset 12 or newer"
SIZES = (1, 2)  # of free batches, in the runs that are compared
FREE = (32, 224, 8, 1)  # other free sizes that are tried


def newer(source: Path, target: Path, opset: int, wanted: int) -> None:
    """Write a file in a newer operator set.

    Args:
        source: the file.
        target: where the other one is written, tensors of second files included.
        opset: of the source.
        wanted: of the target.

    Raises:
        ModelError: it is too old, the converter cannot, or what it writes does not give the same outputs.
    """
    if opset < OLDEST:
        raise ModelError(f"pack: the model has opset {opset}, and ONNX Runtime runs {OLDEST} and newer; {REMEDY}")
    try:
        old = onnx.load(source)
        new = onnx.version_converter.convert_version(old, wanted)
    except Exception as error:  # a RuntimeError or an onnx.onnx_cpp2py_export.ConvertError, by version
        raise ModelError(f"pack: the model has opset {opset}, and onnx cannot convert it: {_line(error)}; {REMEDY}") from error
    for key in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
        if old.HasField(key):
            setattr(new, key, getattr(old, key))
    del new.metadata_props[:]
    new.metadata_props.extend(old.metadata_props)
    new.ir_version = max(old.ir_version, new.ir_version)
    kept = {tensor.name: tensor for tensor in new.graph.initializer}
    for tensor in old.graph.initializer:
        if tensor.name not in kept or not _equal(numpy_helper.to_array(tensor), numpy_helper.to_array(kept[tensor.name])):
            raise ModelError(f"pack: the model has opset {opset}, and onnx's converter changes tensor {tensor.name!r}; {REMEDY}")
    onnx.save(new, target)
    _run_both(source, target, opset)


def _run_both(source: Path, target: Path, opset: int) -> None:
    """Refuse a conversion unless both files give the same bits."""
    try:
        one, other = (_session(path) for path in (source, target))
        feeds = [feed for size in SIZES if (feed := _feed(one, size)) is not None]
        pairs = [pair for feed in feeds for pair in zip(one.run(None, feed), other.run(None, feed), strict=True)]
    except Exception as error:  # the runtime's exceptions share no class
        reason = f"its conversion cannot be checked by running both: {_line(error)}"
        raise ModelError(f"pack: the model has opset {opset}, and {reason}; {REMEDY}") from error
    if not feeds:
        raise ModelError(f"pack: the model has opset {opset}, and ONNX Runtime runs it on no random inputs; {REMEDY}")
    if not all(_equal(np.asarray(a), np.asarray(b)) for a, b in pairs):
        raise ModelError(f"pack: the model has opset {opset}, and what onnx converts it to gives other outputs; {REMEDY}")


def _feed(opened: onnxruntime.InferenceSession, batch: int) -> dict[str, Any] | None:
    """Random inputs that the session runs on, free sizes at the first of `FREE` that it takes; None where it takes none."""
    from torchopt.runtime.inputs import InputShape, feed_of  # a room beside this one, which imports it

    for free in FREE:
        sizes = {spec.name: [n if isinstance(n, int) and n > 0 else free for n in spec.shape] for spec in opened.get_inputs()}
        for spec in opened.get_inputs():
            if spec.shape and not (isinstance(spec.shape[0], int) and spec.shape[0] > 0):
                sizes[spec.name][0] = batch
        asked = {name: InputShape(shape=tuple(shape)) for name, shape in sizes.items()}
        feed = dict(feed_of(opened, "pack", inputs=asked, seed=batch))
        with contextlib.suppress(Exception):  # the runtime's exceptions share no class
            opened.run(None, feed)
            return feed
    return None


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:200]
