"""The last step of an export: the graph in the operator set asked for, checked, opened by ONNX Runtime, proven, and only then written."""

from __future__ import annotations

import os
from collections.abc import Callable

import onnx
import onnx.version_converter
import onnx_ir as ir
import onnxruntime

from torchopt.errors import ModelError
from torchopt.io.files import atomic_path
from torchopt.onnx_file.serialize import serialized
from torchopt.pack.proof import prove

SIXTEEN_BITS = 21  # the opset whose QuantizeLinear gives 16-bit integers


def lowered(graph: ir.Model, opset: int) -> ir.Model:
    """Return the graph in an older operator set, where it has a newer one.

    Raises:
        ModelError: an operator of the graph does not exist there.
    """
    if graph.opset_imports[""] <= opset:
        return graph
    try:
        old = onnx.version_converter.convert_version(ir.to_proto(graph), opset)
    except Exception as error:  # a RuntimeError or an onnx.onnx_cpp2py_export.ConvertError, by version
        raise ModelError(f"export: the graph cannot be written in opset {opset}: {str(error)[:200]}; use 21") from error
    old.ir_version = 8 if opset < 19 else old.ir_version
    return ir.from_proto(old)


def check_integers(graph: ir.Model, opset: int) -> None:
    """Refuse 16-bit activations in an operator set that has none.

    Raises:
        ModelError: they are there.
    """
    wide = {ir.DataType.UINT16, ir.DataType.INT16}
    if opset < SIXTEEN_BITS and any(value.dtype in wide for value in graph.graph.initializers.values()):
        raise ModelError(f"export: activations of 16 bits need opset {SIXTEEN_BITS}, got {opset}; leave opset out")


def write_checked(
    graph: ir.Model,
    path: str | os.PathLike[str],
    *,
    dense: bytes | None = None,
    compare: Callable[[onnxruntime.InferenceSession], None] | None = None,
) -> int:
    """Check the graph, let ONNX Runtime load it, prove it, write it atomically, and return its size in bytes.

    Args:
        graph: the graph.
        path: the file.
        dense: the same file before packing, where it was packed: the weights that ONNX Runtime decodes are compared with it.
        compare: runs the file, and raises where it computes something else than the model.

    Raises:
        ModelError: the checker or the runtime refuses it, it does not decode to what it was, or `compare` refuses it.
        FileError: the file cannot be written.
    """
    data = serialized(graph, "export", shapes=False)  # every runtime infers them; in a small file they are a tenth
    try:
        onnx.checker.check_model(data)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        opened = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no class
        raise ModelError(f"export: the graph is refused by the checker or by ONNX Runtime: {str(error)[:300]}") from error
    if dense is not None:
        prove(dense, data, "export")
    if compare is not None:
        compare(opened)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return len(data)
