"""Reading an ONNX file that anyone may have made or damaged: whole, with the tensors that lie beside it, or not at all.

Large tensors stay in the file: they are arrays over its pages, which the system reads when they are used.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from torchopt.errors import FileError
from torchopt.onnx_file.protobuf import HERE, without_data
from torchopt.onnx_file.sparse import check_names, densify, densify_nodes
from torchopt.onnx_file.tensors import places

IN_A_BYTE: dict[int, int] = {  # elements of the types that share a byte
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1), 2),
    **dict.fromkeys((TensorProto.UINT2, TensorProto.INT2), 4),
}
TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
ORT_FORMAT = b"ORTM"  # at byte 4, the mark of a flat buffer
LIMIT = 2**31 - 1  # bytes of one message of protocol buffers
KEPT, SHAPES, MAPS = (
    "torchopt.kept",
    "torchopt.shapes",
    "torchopt.maps",
)  # in `meta` of model and graphs: what onnx-ir does not carry
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
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise FileError(
            f"{path}: is no whole ONNX file ({str(first).splitlines()[0][:200] if str(first) else first!r})"
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
    if data[4:8] == ORT_FORMAT:
        raise ValueError("it is in ONNX Runtime's own format, .ort: give the .onnx file that it was made from")
    if len(data) > LIMIT:
        raise ValueError(f"it has {len(data) / 1e9:.2f} GB, and one file holds 2 GB at most: the rest lies beside it")
    message = without_data(data)
    proto = onnx.ModelProto.FromString(message)
    check_names(proto.graph)
    densify(proto.graph)
    for function in proto.functions:
        densify_nodes(function.node)
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    maps = {info.name: onnx.TypeProto.FromString(info.type.SerializeToString()) for info in values if _has_map(info.type)}
    for info in values:
        if info.name in maps:
            info.ClearField("type")
    model = ir.serde.deserialize_model(proto)
    for info in proto.graph.value_info:
        if info.name in maps:
            info.type.CopyFrom(maps[info.name])
    model.meta[MAPS] = maps
    if _fill(model, path, data) != message.count(HERE.encode()):
        raise ValueError("a tensor lies where ONNX has none")
    for graph, written in pairs(model, proto):
        graph.meta[SHAPES] = [*written.value_info]
    model.meta[KEPT] = onnx.ModelProto(training_info=proto.training_info)
    return model


def _has_map(kind: onnx.TypeProto) -> bool:
    """Whether a type is, or holds, a map, as classifiers give them; onnx-ir has none."""
    while kind.HasField("sequence_type") or kind.HasField("optional_type"):
        kind = kind.sequence_type.elem_type if kind.HasField("sequence_type") else kind.optional_type.elem_type
    return kind.HasField("map_type")


def _fill(model: ir.Model, path: Path, data: mmap.mmap) -> int:
    """Give the tensors their data; return how many of them lie in the model's own file, apart from its message."""
    sources, own = {HERE: data}, 0
    for tensor, put in places(model):
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            if location not in sources:
                sources[location] = mapped(beside(path, location))
            put(_view(tensor, sources[location]))
            own += location == HERE
        elif isinstance(tensor, ir.serde.TensorProtoTensor):
            _check_size(tensor.raw)
            tensor.numpy()  # fails where the bytes do not fit the shape
    model.meta[EXTERNAL] = len(sources) > 1
    model.meta[SOURCES] = list(sources.values())
    return own


def pairs(model: ir.Model, proto: onnx.ModelProto) -> Iterator[tuple[ir.Graph, onnx.GraphProto]]:
    """Yield each graph of a model, subgraphs included, with the message that says the same."""
    graphs: list[tuple[ir.Graph, onnx.GraphProto]] = [(model.graph, proto.graph)]
    bodies: list[tuple[Iterable[ir.Node], Iterable[onnx.NodeProto]]] = [(model.graph, proto.graph.node)]
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    bodies += [(f, functions[key].node) for key, f in model.functions.items() if key in functions]
    for nodes, messages in bodies:  # it grows
        for node, message in zip(nodes, messages, strict=True):
            for attribute in message.attribute:
                found = node.attributes.get(attribute.name)
                if found is None or found.is_ref():
                    continue
                if found.type == ir.AttributeType.GRAPH:
                    graphs.append((found.as_graph(), attribute.g))
                    bodies.append((found.as_graph(), attribute.g.node))
                elif found.type == ir.AttributeType.GRAPHS:
                    graphs += zip(found.as_graphs(), attribute.graphs, strict=True)
                    bodies += [(g, m.node) for g, m in zip(found.as_graphs(), attribute.graphs, strict=True)]
    yield from graphs


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


def beside(path: Path, location: str) -> Path:
    """Return the file at a location relative to the model's; none outside its folder.

    Both may be links, as in the cache of a model hub, whose files are links into a folder of blobs. So the data lie where they may if
    they are below the folder of the model's link or, all links followed, below that of the model itself. ONNX Runtime takes the same.

    Raises:
        ValueError: it lies elsewhere, or is not there.
    """
    found = (path.parent / location).resolve()
    inside = not os.path.isabs(location) and os.path.normpath(location).split(os.sep)[0] != os.pardir
    if not inside or not any(found.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
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
    """Refuse a tensor that holds more or fewer elements than its shape says, and one without a type.

    Where elements share a byte, onnx-ir makes an array of the size that the file claims; of no data at all it makes zeros.
    """
    count, kind = math.prod(tensor.dims), tensor.data_type
    if kind == TensorProto.UNDEFINED or min(tensor.dims, default=0) < 0:
        raise ValueError(f"tensor {tensor.name!r} has the shape {tuple(tensor.dims)} and type {kind}")
    shared = IN_A_BYTE.get(kind, 1)
    if tensor.HasField("raw_data") and kind != TensorProto.STRING:
        there, needed = len(tensor.raw_data), -(-count * ir.DataType(kind).bitwidth // 8)
    else:
        there = sum(len(getattr(tensor, f)) for f in TYPED if f == onnx.helper.tensor_dtype_to_field(kind))
        needed = -(-count // shared) * (2 if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1)
    if there != needed:
        raise ValueError(f"tensor {tensor.name!r} has {there} bytes or numbers for {count} elements")
