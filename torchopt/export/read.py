"""Reading an ONNX file that anyone may have made or damaged: whole, with the tensors that lie beside it, or not at all."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto

from torchopt.errors import FileError

IN_A_BYTE: dict[int, int] = {  # elements of the types that share a byte
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1), 2),
    **dict.fromkeys((TensorProto.UINT2, TensorProto.INT2), 4),
}


def read(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file.

    Raises:
        FileError: it is missing, damaged, or no ONNX file, or data that it refers to is missing or lies outside its folder.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file; give an ONNX file")
    log = logging.getLogger("onnx_ir")  # warns of what is an error here
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        proto = onnx.load(path)
        for tensor in _tensors(proto.graph):
            _check_size(tensor)
        model = ir.serde.deserialize_model(proto)
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()  # a view, made when first asked for: fails where the bytes do not fit the shape
    except Exception as error:  # protobuf, onnx and onnx-ir raise classes of their own
        raise FileError(
            f"{path}: is no whole ONNX file ({str(error).splitlines()[0][:200] if str(error) else error!r})"
        ) from error
    finally:
        log.setLevel(level)
    if not model.opset_imports:
        raise FileError(f"{path}: is no ONNX file: it names no operator set")
    for value in (v for node in model.graph for v in node.inputs if v is not None):
        if value.producer() is None and not (value.is_initializer() or value.is_graph_input()):
            raise FileError(f"{path}: is no whole ONNX file (a node reads {value.name!r}, which nothing gives)")
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from (attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t"))


def _check_size(tensor: TensorProto) -> None:
    """Where elements share a byte, onnx-ir makes an array of the size that the file claims, whatever bytes there are."""
    shared = IN_A_BYTE.get(tensor.data_type)
    if shared is not None:
        count, there = math.prod(tensor.dims), len(tensor.raw_data) or len(tensor.int32_data)
        if there != -(-count // shared):
            raise ValueError(f"tensor {tensor.name!r} has {there} bytes for {count} elements")
