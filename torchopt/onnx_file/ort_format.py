"""ORT's own file format for mobile builds, with the list of the operators that a build of the runtime must contain.

ONNX Runtime Mobile reads `.ort` (a flat buffer, optimized ahead) and can be built with nothing but the operators of one list. The
conversion is onnxruntime's own tool; it folds packed weights, so that a `.ort` file is dense.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torchopt.errors import FileError
from torchopt.io.files import atomic_path

OPERATORS = ".required_operators.config"


@dataclass(frozen=True, kw_only=True)
class OrtFiles:
    """What was written: the model, the list of operators, and the model's size."""

    path: Path
    operators: Path
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.size_bytes:,} bytes; operators that a build needs: {self.operators}"


def to_ort(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> OrtFiles:
    """Convert an ONNX file to ORT format, and write the list of required operators beside it.

    Args:
        src: an ONNX file.
        dst: the `.ort` file to write; the list is called `<dst stem>.required_operators.config`.

    Raises:
        FileError: `src` is missing, the converter refuses it, or `dst` cannot be written.
    """
    source, target = Path(src), Path(dst)
    if not source.is_file():
        raise FileError(f"{source}: there is no such file; give an ONNX file")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(source, Path(folder) / "model.onnx")
        # In a process of its own: the tool prints, and sets the runtime's global log level.
        tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", folder, "--optimization_style", "Fixed"]
        done = subprocess.run(tool, capture_output=True, text=True, check=False)
        written = Path(folder) / "model.ort"
        if done.returncode or not written.is_file():
            reason = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise FileError(f"{source}: onnxruntime cannot convert it to ORT format: {reason[:300]}")
        operators = target.with_name(target.stem + OPERATORS)
        for made, path in ((written, target), (Path(folder) / OPERATORS.lstrip("."), operators)):
            with atomic_path(path) as temporary:
                shutil.copyfile(made, temporary)
    return OrtFiles(path=target, operators=operators, size_bytes=target.stat().st_size)
