"""Operators that ONNX Runtime has no kernel for and writes out as the functions that ONNX defines them by.

In a file with functions of its own it does so at once, in another one later, after its first optimizations. Packing brings functions
into a file. So of such operators the outputs may differ in the last bit, and the report names them.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from torchopt.codecs.encoding import DOMAIN
from torchopt.onnx_file.view import STANDARD, View

LATEST = 2**31 - 1  # the end of a kernel's versions where none is known: such a kernel takes the version that it starts with


def written_out(model: ir.Model, view: View) -> tuple[str, ...]:
    """Return the operators of a model that have a function for a body and no kernel; none where the model has functions anyway."""
    if any(function.domain != DOMAIN for function in model.functions.values()):
        return ()
    kernels: dict[str, list[tuple[int, int]]] = {}
    for kernel in getattr(runtime, "get_all_opkernel_def", list)():  # a build without this list has no kernels, to be safe
        if kernel.domain in STANDARD and kernel.provider == "CPUExecutionProvider":
            kernels.setdefault(kernel.op_name, []).append(kernel.version_range)
    opset = next((model.opset_imports[d] for d in sorted(STANDARD) if d in model.opset_imports), None)
    names = {node.op_type for _, node in view.nodes if node.domain in STANDARD} if opset is not None else set()
    return tuple(sorted(name for name in names if _is_written_out(name, int(opset or 0), kernels.get(name, []))))


def _is_written_out(name: str, opset: int, kernels: list[tuple[int, int]]) -> bool:
    try:
        schema: Any = onnx.defs.get_schema(name, opset, "")
    except onnx.defs.SchemaError:
        return False
    if not (schema.has_function or schema.has_context_dependent_function):
        return False
    version = schema.since_version
    return not any(first == version or (first <= version <= last < LATEST) for first, last in kernels)
