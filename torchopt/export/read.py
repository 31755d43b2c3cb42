"""Reading an ONNX file that anyone may have made or damaged: whole, with the tensors that lie beside it, or not at all.

Large tensors stay in the file: they are arrays over its pages, which the system reads when they are used.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from torchopt.errors import FileError
from torchopt.export.sparse import densify, densify_nodes
from torchopt.export.tensors import places
from torchopt.export.wire import HERE, without_data

IN_A_BYTE: dict[int, int] = {  # elements of the types that share a byte
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1), 2),
    **dict.fromkeys((TensorProto.UINT2, TensorProto.INT2), 4),
}
LIMIT = 2**31 - 1  # bytes of one message of protocol buffers
KEPT = "torchopt.kept"  # in `model.meta`: what onnx-ir does not carry
EXTERNAL, SOURCES = "torchopt.external", "torchopt.sources"  # whether data lie beside the file; the files, mapped


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
        model = _read(Path(path))
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


def _read(path: Path) -> ir.Model:
    data = mapped(path)
    if len(data) > LIMIT:
        raise ValueError(f"it has {len(data) / 1e9:.2f} GB, and one file holds 2 GB at most: the rest lies beside it")
    proto = onnx.ModelProto.FromString(without_data(data))
    densify(proto.graph)
    for function in proto.functions:
        densify_nodes(function.node)
    model = ir.serde.deserialize_model(proto)
    sources = {HERE: data}
    for tensor, put in places(model):
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            if location not in sources:
                sources[location] = mapped(_beside(path, location))
            put(_view(tensor, sources[location]))
        elif isinstance(tensor, ir.serde.TensorProtoTensor):
            _check_size(tensor.raw)
            tensor.numpy()  # fails where the bytes do not fit the shape
    model.meta[KEPT] = onnx.ModelProto(training_info=proto.training_info)
    model.meta[EXTERNAL] = len(sources) > 1
    model.meta[SOURCES] = list(sources.values())
    return model


def release(model: ir.Model) -> None:
    """Give the memory back that holds pages of the files that a model was read from; they are read again when they are used."""
    for source in model.meta.get(SOURCES, []):
        if hasattr(mmap, "MADV_DONTNEED"):
            source.madvise(mmap.MADV_DONTNEED)


def mapped(path: Path) -> mmap.mmap:
    """Return a file's bytes, which are read when they are used.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _beside(path: Path, location: str) -> Path:
    """The file at a location relative to the model's; none outside its folder, also by no symbolic link."""
    folder = path.parent.resolve()
    found = (folder / location).resolve()
    if not found.is_relative_to(folder):
        raise ValueError(f"its data lie in {location!r}, outside its folder")
    if not found.is_file():
        raise ValueError(f"its data lie in {location!r}, and there is no such file")
    return found


def _view(tensor: ir.ExternalTensor, data: mmap.mmap) -> ir.TensorProtocol:
    """A tensor over the bytes that it names."""
    shape, dtype, offset = tensor.shape.numpy(), tensor.dtype, tensor.offset or 0
    size = -(-math.prod(shape) * dtype.bitwidth // 8)
    length = size if tensor.length is None else tensor.length
    if min(shape, default=0) < 0 or length != size or not 0 <= offset <= len(data) - size:
        raise ValueError(f"tensor {tensor.name!r} has {min(length, len(data) - offset)} bytes for {math.prod(shape)} elements")
    name, doc, more = tensor.name, tensor.doc_string, dict(tensor.metadata_props) or None
    if dtype.bitwidth < 8:
        packed = np.frombuffer(data, np.uint8, size, offset)
        return ir.PackedTensor(packed, dtype, shape=shape, name=name, doc_string=doc, metadata_props=more)
    array = np.frombuffer(data, dtype.numpy(), math.prod(shape), offset).reshape(shape)
    return ir.Tensor(array, dtype=dtype, name=name, doc_string=doc, metadata_props=more)


def _check_size(tensor: TensorProto) -> None:
    """Where elements share a byte, onnx-ir makes an array of the size that the file claims, whatever bytes there are."""
    shared = IN_A_BYTE.get(tensor.data_type)
    if shared is not None:
        count, there = math.prod(tensor.dims), len(tensor.raw_data) or len(tensor.int32_data)
        if there != -(-count // shared):
            raise ValueError(f"tensor {tensor.name!r} has {there} bytes for {count} elements")
