"""A stranger's ONNX file, smaller: weights rounded, packed, compared with what they came from, and written only where that gains.

    read ─ round the weights, or quantize ─ pack ─ run both files ─ time both ─ write

The result is never larger than the source, and says of itself only what was run: on whose inputs, how far apart, how fast.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchopt.errors import ConfigError, ModelError, nearest
from torchopt.io.files import atomic_path
from torchopt.onnx_file.read import EXTERNAL, read
from torchopt.onnx_file.serialize import write
from torchopt.onnx_to_onnx.calibrated import Data, quantize_dynamic, quantize_static, read_batches
from torchopt.onnx_to_onnx.likeness import Likeness, likeness
from torchopt.onnx_to_onnx.rewrite import rewrite
from torchopt.pack import pack as pack_file
from torchopt.runtime import benchmark, session
from torchopt.runtime.inputs import Asked, feed_of, run

WEIGHTS = ("int8", "int4", "float16")
ACTIVATIONS = ("float", "static", "dynamic")
REPEATS = 20  # interleaved bursts of both files


@dataclass(frozen=True, kw_only=True)
class CompressedFile:
    """What was written.

    Attributes:
        path: the file.
        form: such as "int8 weights", "16 shared values", "int8 weights and activations", or "as it was" where nothing was gained.
        tensors: weights put into that form.
        original_bytes: of the source, with data that lie beside it.
        size_bytes: of the file, likewise.
        likeness: how like the source's its outputs are.
        latency_ratio: its latency over the source's, median of interleaved bursts; None where `time` was off.
    """

    path: Path
    form: str
    tensors: int
    original_bytes: int
    size_bytes: int
    likeness: Likeness
    latency_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        less = f"÷ {self.original_bytes / max(1, self.size_bytes):.2f}"
        time = "" if self.latency_ratio is None else f"; latency × {self.latency_ratio:.2f}"
        return (
            f"{self.path}: {self.size_bytes:,} bytes ({self.original_bytes:,} before, {less}); {self.form}, {self.tensors} tensors; "
            f"{self.likeness}{time}"
        )


def compress_onnx(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    weights: str | None = None,
    n_clusters: int | None = None,
    activations: str | None = None,
    calibration: Data | None = None,
    method: str = "minmax",
    inputs: Asked | None = None,
    pack: bool = True,
    time: bool = True,
) -> CompressedFile:
    """Write an ONNX file of anyone's with smaller weights, and say how like the original it is.

    Args:
        src: the file; its weights may lie beside it, in constants, or in branches.
        dst: the file to write; the same path as `src` is fine.
        weights: "int8" (the default; a scale for each channel), "int4" (a scale for each 32 neighbours) or "float16". The weights become
            float32 again when a runtime loads the file, so latency stays; given zeros stay zeros.
        n_clusters: instead, so many shared values a weight, 2 to 256.
        activations: "float" (the default), "dynamic" or "static": the last two make ONNX Runtime compute in integers; "static" is the
            default where `calibration` is given.
        calibration: data for "static", and for the comparison: an .npz file or a mapping with one array an input (rows along the first
            axis), or batches, each such a mapping.
        method: how "static" finds ranges: "minmax", "percentile" or "entropy".
        inputs: shapes of inputs whose sizes the file leaves free, for comparison and timing: {"x": (1, 3, 320, 320)}.
        pack: write the weights in their smallest exact form too.
        time: measure the latency of both files.

    Raises:
        ConfigError: an unknown choice, two choices that exclude one another, or a free size that is not given.
        DataError: calibration data do not fit the file.
        FileError: the source cannot be read or run, or the destination not be written.
        ModelError: the file has no weights to round, or ONNX Runtime's quantizer does not take it.

    Example:
        >>> import numpy as np, onnx
        >>> graph = onnx.parser.parse_model('''<ir_version: 10, opset_import: ["": 21]> g (float[N, 64] x) => (y) {y = MatMul (x, w)}''')
        >>> values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        >>> graph.graph.initializer.extend([onnx.numpy_helper.from_array(values, "w")])
        >>> folder = Path(tempfile.mkdtemp())
        >>> onnx.save(graph, folder / "a.onnx")
        >>> small = compress_onnx(folder / "a.onnx", folder / "b.onnx", time=False)
        >>> small.size_bytes < 0.4 * small.original_bytes, small.likeness.sqnr_db > 40
        (True, True)
    """
    kind, mode = _checked(weights, n_clusters, activations, calibration)
    session(src)  # what cannot be run is refused before anything else
    batches = None if calibration is None else read_batches(calibration, src)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        form, tensors = _smaller(Path(src), dense, kind, mode, n_clusters or 0, batches or [], method)
        small = _packed(dense, inputs, batches) if pack else dense
        before = file_bytes(src)
        if file_bytes(small) >= before:
            small, form, tensors = Path(src), "as it was: no form is smaller", 0
        like = likeness(src, small, batches, inputs)
        ratio = benchmark([src, small], repeats=REPEATS, inputs=inputs, progress=False).rows[1].ratio if time else None
        after = file_bytes(small)
        _placed(small, Path(dst))
    return CompressedFile(
        path=Path(dst), form=form, tensors=tensors, original_bytes=before, size_bytes=after, likeness=like, latency_ratio=ratio
    )


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes of an ONNX file, with those of its tensors that lie beside it."""
    model, own = read(path), Path(path).stat().st_size
    if not model.meta.get(EXTERNAL):
        return own
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return own + sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _checked(weights: str | None, n_clusters: int | None, activations: str | None, calibration: object) -> tuple[str, str]:
    """The kind of the weights, and how activations are treated."""
    mode = activations or ("float" if calibration is None else "static")
    if mode not in ACTIVATIONS:
        raise ConfigError(
            f"compress: activations={mode!r}; one of {', '.join(ACTIVATIONS)} is needed{nearest(mode, ACTIVATIONS)}"
        )
    if weights is not None and weights not in WEIGHTS:
        raise ConfigError(f"compress: weights={weights!r}; one of {', '.join(WEIGHTS)} is needed{nearest(weights, WEIGHTS)}")
    if n_clusters is not None and not (isinstance(n_clusters, int) and 2 <= n_clusters <= 256):
        raise ConfigError(f"compress: n_clusters={n_clusters!r}; a whole number from 2 to 256 is needed")
    if n_clusters is not None and weights is not None:
        raise ConfigError(f"compress: weights={weights!r} and n_clusters={n_clusters} exclude one another; give one of them")
    kind = "shared" if n_clusters is not None else weights or "int8"
    if mode != "float" and kind != "int8":
        raise ConfigError(
            f"compress: activations={mode!r} needs int8 weights, got {weights or f'n_clusters={n_clusters}'}; leave it out"
        )
    if mode == "static" and calibration is None:
        raise ConfigError(
            "compress: activations='static' needs data; give calibration= (on the command line --calibration FILE.npz)"
        )
    return kind, mode


def _smaller(
    source: Path, target: Path, kind: str, mode: str, clusters: int, batches: list[dict[str, Any]], method: str
) -> tuple[str, int]:
    """Write the file with smaller weights; return what they are, and how many."""
    if mode == "static":
        quantize_static(source, target, batches, method)
    elif mode == "dynamic":
        quantize_dynamic(source, target)
    if mode != "float":
        many = sum(v.dtype is not None and v.dtype.name == "INT8" for v in read(target).graph.initializers.values())
        return f"int8 weights, {mode} activations", many
    model = read(source)
    forms = rewrite(model, kind, clusters)
    if not forms:
        raise ModelError(
            f"compress: {source} has no float32 weight of a layer with 1,024 elements or more; there is nothing to round"
        )
    write(model, target)
    return (f"{clusters} shared values" if kind == "shared" else f"{kind} weights"), len(forms)


def _packed(dense: Path, inputs: Asked | None, batches: list[dict[str, Any]] | None) -> Path:
    """The packed file, proved to give the same bits as the dense one on one run."""
    target = dense.with_name("packed.onnx")
    pack_file(dense, target)
    a, b = session(dense), session(target)
    feed = feed_of(a, str(dense), inputs=inputs if batches is None else batches[0])
    for name, y, z in zip([o.name for o in a.get_outputs()], run(a, feed, str(dense)), run(b, feed, str(target)), strict=True):
        if hasattr(y, "tobytes") and y.tobytes() != z.tobytes():
            raise ModelError(f"compress: output {name} differs between the dense and the packed file; give pack=False")
    return target if file_bytes(target) < file_bytes(dense) else dense


def _placed(small: Path, target: Path) -> None:
    """Write the chosen file at its place; one whose data lie beside it is written anew, as a pair."""
    if target.exists() and small.samefile(target):
        return
    model = read(small)
    if model.meta.get(EXTERNAL):
        write(model, target)
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(small, temporary)
