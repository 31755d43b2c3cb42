"""A graph as an ONNX file, tensor by tensor: none is copied into a message of protocol buffers first.

The message is made with a place holder for each large tensor, and the tensors go straight to the file: to where the place holders
stand or, beyond the 2 GB of one message, to a second file beside it. That one never has the name of one that is there: the old pair of
files stays whole until the new one is, and the rename of the model's file is the one moment of change.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from torchopt.errors import ModelError
from torchopt.io.files import atomic_path
from torchopt.onnx_file.protobuf import HERE, LARGE, with_data, without_data
from torchopt.onnx_file.read import EXTERNAL, KEPT, LIMIT, MAPS, SHAPES, mapped, pairs
from torchopt.onnx_file.tensors import Put, bytes_of, places

PAGE = 4096  # bytes, to which tensors in the second file are aligned: runtimes map it
Held = tuple[ir.TensorProtocol, Put, int]  # a tensor, what puts it back, and its offset in the second file


def serialized(model: ir.Model, where: str, *, shapes: bool = True) -> bytes:
    """Return the bytes of the file, with all tensors in it.

    Args:
        model: the graph.
        where: what the error names.
        shapes: write the shapes of the values between nodes, as far as they are known.

    Raises:
        ModelError: they are more than protobuf's 2 GB.
    """
    with _held_out(model, HERE) as held:
        pieces, size = with_data(_message(model, where, shapes=shapes))
        if size > LIMIT:
            raise ModelError(f"{where}: it takes {size / 1e9:.2f} GB, and one ONNX file holds 2 GB at most; split the model")
        return b"".join(piece if isinstance(piece, bytes) else bytes_of(held[piece][0]).data for piece in pieces)


def size_of(model: ir.Model, where: str, *, shapes: bool = True) -> int:
    """Return how many bytes the file takes, all tensors in it counted; `shapes` as in `serialized`."""
    with _held_out(model, HERE):
        return with_data(_message(model, where, shapes=shapes))[1]


def write(model: ir.Model, path: str | os.PathLike[str], *, check: Callable[[Path], None] | None = None) -> None:
    """Write a graph to a file, atomically; its tensors go to a second one if they came from one, or if they take more than 2 GB.

    Args:
        model: the graph.
        path: the file.
        check: is given the whole file under its temporary name; where it raises, nothing was written.

    Raises:
        ModelError: it cannot be written as an ONNX file.
        FileError: the file cannot be written.
    """
    target = Path(path)
    old = _data_of(target)
    with _held_out(model, HERE) as held:
        pieces, size = with_data(_message(model, str(path)))
        if size <= LIMIT and not model.meta.get(EXTERNAL):
            _write(target, pieces, held, check)
    if size > LIMIT or model.meta.get(EXTERNAL):
        _write_pair(model, target, check)
    _remove_old(target, old)


def copied(model: ir.Model, source: Path, target: Path) -> bool:
    """Write the file that a graph was read from, which nothing changed, as it is; False where its data lie beside it in another folder.

    Raises:
        FileError: the file cannot be written.
    """
    if target.exists() and source.samefile(target):
        return True
    if model.meta.get(EXTERNAL) and source.parent.resolve() != target.parent.resolve():
        return False
    old = _data_of(target)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    _remove_old(target, old)
    return True


def _remove_old(target: Path, old: set[str]) -> None:
    for name in old - _data_of(target):
        target.with_name(name).unlink(missing_ok=True)


def _write_pair(model: ir.Model, target: Path, check: Callable[[Path], None] | None) -> None:
    """Write the second file under a new name, then the first, which names it."""
    names = (f"{target.name}{f'.{number}' if number else ''}.data" for number in itertools.count())
    second = next(name for name in names if not target.with_name(name).exists())
    with _held_out(model, second) as held:
        message = _message(model, str(target))
        with atomic_path(target.with_name(second)) as temporary, open(temporary, "wb") as file:
            for tensor, _, offset in held:
                file.seek(offset)
                file.write(bytes_of(tensor).data)
    try:
        _write(target, [message], [], check)
    except BaseException:
        target.with_name(second).unlink()
        raise


def _write(target: Path, pieces: list[bytes | int], held: list[Held], check: Callable[[Path], None] | None) -> None:
    with atomic_path(target) as temporary:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece if isinstance(piece, bytes) else bytes_of(held[piece][0]).data)
        if check is not None:
            check(temporary)


@contextlib.contextmanager
def _held_out(model: ir.Model, location: str) -> Iterator[list[Held]]:
    """Put place holders where large tensors are; yield these, and put them back afterwards."""
    held: list[Held] = []
    offset = 0
    try:
        for tensor, put in list(places(model)):
            whole = isinstance(tensor, (ir.serde.TensorProtoTensor, ir.StringTensor))
            if whole or (tensor.nbytes <= LARGE and not isinstance(tensor, ir.LazyTensor)):
                continue
            place_holder = ir.ExternalTensor(
                location,
                offset=len(held) if location == HERE else offset,
                length=tensor.nbytes,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
            put(place_holder)
            held.append((tensor, put, offset))
            offset += -(-tensor.nbytes // PAGE) * PAGE
        yield held
    finally:
        for tensor, put, _ in held:
            put(tensor)


def _message(model: ir.Model, where: str, *, shapes: bool = True) -> bytes:
    try:
        proto = ir.to_proto(model)
        proto.MergeFrom(model.meta.get(KEPT, onnx.ModelProto()))
        for info in (*proto.graph.input, *proto.graph.output):
            if info.name in model.meta.get(MAPS, ()):
                info.type.CopyFrom(model.meta[MAPS][info.name])
        for graph, message in pairs(model, proto):
            stored = {tensor.name for tensor in message.initializer}  # whose types and shapes onnx-ir writes a second time
            known = graph.meta.get(SHAPES)
            kept = known if known is not None else [i for i in message.value_info if shapes and i.name not in stored]
            kept = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in kept]
            del message.value_info[:]
            message.value_info.extend(kept)
            _once(message.initializer, message.node)
        for function in proto.functions:
            _once([], function.node)
        return bytes(proto.SerializeToString())
    except Exception as error:  # google.protobuf.message.EncodeError or a ValueError, by version
        raise ModelError(f"{where}: cannot be written as one ONNX file: {str(error)[:200]}") from error


def _once(tensors: Iterable[onnx.TensorProto], nodes: Iterable[onnx.NodeProto]) -> None:
    """Take out the metadata of tensors that onnx-ir writes a second and third time."""
    for tensor in itertools.chain(tensors, (a.t for node in nodes for a in node.attribute if a.HasField("t"))):
        known = {entry.key: entry.value for entry in tensor.metadata_props}
        if len(known) < len(tensor.metadata_props):
            del tensor.metadata_props[:]
            for key, value in known.items():
                tensor.metadata_props.add(key=key, value=value)


def _data_of(path: Path) -> set[str]:
    """The second files of ours that a model's file names."""
    try:
        tensors = onnx.ModelProto.FromString(without_data(mapped(path))).graph.initializer
    except Exception:  # nothing there, or nothing that can be read: so nothing of ours
        return set()
    named = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return {name for name in named if name.startswith(f"{path.name}.") and name.endswith(".data") and "/" not in name}
