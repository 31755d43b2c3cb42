"""Sessions of ONNX Runtime: threads pinned, quiet, and every failure one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime

from torchopt.errors import ConfigError, FileError


def session(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    optimized_to: str | os.PathLike[str] | None = None,
    content: bytes | None = None,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file for inference on the CPU.

    Args:
        path: the file.
        threads: for one operator; operators run one after another.
        optimized_to: write the graph that ORT really runs to this file, and its weights beside it (never ship it: they are dense).
        content: open this in place of what the file holds; tensors outside it are those of the file.

    Raises:
        FileError: the file is missing, or ONNX Runtime refuses it.
        ConfigError: `threads` is below 1.
    """
    if threads < 1:
        raise ConfigError(f"session: threads={threads}; at least 1 is needed")
    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file; give an ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", Path(optimized_to).stem + ".bin"
        )
    if content is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(Path(path).absolute().parent)
        )
    try:
        return onnxruntime.InferenceSession(
            str(path) if content is None else content, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )  # a fallback would print on stdout, and open the same file in the same way
    except Exception as error:  # the runtime's exceptions share no class
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise FileError(f"{path}: ONNX Runtime {onnxruntime.__version__} refuses it: {reason}") from error
