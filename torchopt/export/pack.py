"""Pack and unpack any ONNX file: weights as codes, tables, masks and gaps, decoded by the runtime at load. Lossless both ways.

Each initializer is given its smallest encoding (`torchopt.packing`) and becomes one call of a model-local function whose output
has the initializer's old name; nothing else in the graph changes. `unpack` finds those calls again and restores the dense tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from torchopt.errors import FileError, ModelError
from torchopt.export.calls import Names, read_encoding, replace
from torchopt.export.decoded import weight_values
from torchopt.export.decoders import DOMAIN, function_bytes, function_name
from torchopt.files import atomic_path
from torchopt.packing import CALL_BYTES, Encoding, decode, encode, encodings, entropy_bytes

PACKABLE = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32}
OLDEST_OPSET = 18  # BitwiseAnd, BitwiseOr
SMALLEST = 256  # bytes of a tensor below which no encoding pays
SMALL = 1 << 18  # bytes of a tensor below which the cost of its decoder counts


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One row of a `PackReport`: a tensor, its codec, and bytes before, after, and at the entropy bound."""

    name: str
    codec: str
    dense_bytes: int
    packed_bytes: int
    entropy_bytes: int


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What packing did to each tensor that it looked at."""

    rows: list[PackedTensor] = field(default_factory=list)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all the tensors before."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all the tensors after, tables and positions included."""
        return sum(row.packed_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{r.name:<40} {r.codec:<16} {r.dense_bytes:>12,} → {r.packed_bytes:>10,}" for r in self.rows]
        return "\n".join([*lines, f"{'total':<57} {self.dense_bytes:>12,} → {self.packed_bytes:>10,}"])


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> PackReport:
    """Write `src` with its weights packed to `dst`; outputs stay bit-equal.

    Args:
        src: any ONNX file.
        dst: the file to write; the same path as `src` is fine.

    Raises:
        FileError: `src` is missing or no ONNX file, or `dst` cannot be written.
        ModelError: the model's opset is older than 18, which has no bitwise operators.
    """
    model = read(src)
    report = pack_model(model)
    _write(model, dst)
    return report


def unpack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Write `src` with every packed weight dense again to `dst`: the exact inverse of `pack`.

    Raises:
        FileError: `src` is missing, damaged, or no ONNX file, or `dst` cannot be written.
    """
    model = read(src)
    unpack_model(model, str(src))
    _write(model, dst)


def decode_initializers(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the value of each weight of an ONNX file: unpacked, and integers times their scale, by the initializer's name.

    Raises:
        FileError: the file is missing, damaged, or no ONNX file.
    """
    model = read(path)
    unpack_model(model, str(path))
    return weight_values(model)


def pack_model(model: ir.Model) -> PackReport:
    """Pack the weights of `model` in place.

    Raises:
        ModelError: the opset is older than 18.
    """
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise ModelError(f"pack: the model has opset {opset}; convert it to {OLDEST_OPSET} or later, which has bitwise operators")
    fixed = {id(v) for v in (*model.graph.outputs, *model.graph.inputs)}
    weights = {str(v.name): v for v in model.graph.initializers.values() if id(v) not in fixed and _packable(v)}
    rows, names = {}, Names(model)
    for name, encoding in _chosen(weights, opset):
        dense = weights[name].const_value.numpy()  # type: ignore[union-attr]
        rows[name] = PackedTensor(
            name=name,
            codec=encoding.name,
            dense_bytes=dense.nbytes,
            packed_bytes=encoding.payload_bytes,
            entropy_bytes=entropy_bytes(dense, encoding),
        )
        replace(model, weights[name], encoding, opset, names)
    return PackReport(rows=[rows[name] for name in weights if name in rows])


def _chosen(weights: dict[str, ir.Value], opset: int) -> Iterator[tuple[str, Encoding]]:
    """Yield the encoding of each weight that gets one.

    A large tensor takes its smallest. The small ones share decoders, which cost bytes too: starting from all kinds, the kind whose
    loss saves most is dropped, until none does.
    """
    given: set[str] = set()
    options: dict[str, list[Encoding]] = {}
    for name, value in weights.items():
        dense = value.const_value.numpy()  # type: ignore[union-attr]
        if dense.nbytes < SMALL:
            options[name] = list(encodings(dense))
        elif (encoding := encode(dense)) is not None:
            given |= {*function_bytes(encoding, opset)}
            yield name, encoding

    def best(name: str, kinds: set[str]) -> Encoding | None:
        found = (e for e in options[name] if function_name(e, opset) in kinds)
        return min(found, key=lambda e: e.payload_bytes, default=None)

    def cost(kinds: set[str]) -> int:
        saved = ((weights[n].const_value.nbytes, best(n, kinds)) for n in options)  # type: ignore[union-attr]
        tensors = sum(e.payload_bytes + CALL_BYTES if e is not None else dense for dense, e in saved)
        needed = {name: size for kind in kinds for name, size in sizes[kind].items() if name not in given}
        return tensors + sum(needed.values())

    sizes = {function_name(e, opset): function_bytes(e, opset) for found in options.values() for e in found}
    kinds = set(sizes)
    while droppable := sorted(kinds - given):
        least, kind = min((cost(kinds - {kind}), kind) for kind in droppable)
        if least >= cost(kinds):
            break
        kinds.remove(kind)
    for name in options:
        if (encoding := best(name, kinds)) is not None:
            yield name, encoding


def unpack_model(model: ir.Model, where: str) -> None:
    """Make every packed weight of `model` an ordinary initializer again, in place.

    Raises:
        FileError: a packed weight is damaged.
    """
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        if len(node.outputs) != 1:
            raise FileError(f"{where}: the packed weight of node {node.name!r} is damaged ({len(node.outputs)} outputs)")
        try:
            dense = decode(read_encoding(node))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError) as error:
            raise FileError(f"{where}: the packed weight {node.outputs[0].name} is damaged ({error})") from error
        output = node.outputs[0]
        initializer = ir.Value(name=output.name, const_value=ir.tensor(dense, name=output.name))
        initializer.shape, initializer.dtype = ir.Shape(dense.shape), ir.DataType.from_numpy(dense.dtype)
        parts = [v for v in node.inputs if v is not None]
        for user, index in list(output.uses()):
            user.replace_input_with(index, initializer)
        model.graph.remove(node, safe=True)
        output.name = None
        for part in parts:
            if not list(part.uses()) and part.name in model.graph.initializers:
                model.graph.initializers.pop(str(part.name))
        model.graph.register_initializer(initializer)
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)


def _packable(value: ir.Value) -> bool:
    """A weight: of a known type, read by nodes, none of which is a decoder of ours (a packed file stays as it is)."""
    tensor, users = value.const_value, list(value.uses())
    if tensor is None or tensor.dtype not in PACKABLE or not users or tensor.nbytes <= SMALLEST:
        return False
    return all(user.domain != DOMAIN for user, _ in users)


def read(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file.

    Raises:
        FileError: it is missing, damaged, or no ONNX file.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: there is no such file; give an ONNX file")
    try:
        model = ir.serde.deserialize_model(onnx.load(path))
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value.numpy()  # a view, made when first asked for: fails where the bytes do not fit the shape
    except Exception as error:  # protobuf, onnx and onnx-ir raise classes of their own
        raise FileError(
            f"{path}: is no whole ONNX file ({str(error).splitlines()[0][:200] if str(error) else error!r})"
        ) from error
    if not model.opset_imports:
        raise FileError(f"{path}: is no ONNX file: it names no operator set")
    return model


def _write(model: ir.Model, path: str | os.PathLike[str]) -> None:
    try:
        proto = ir.to_proto(model)
        stored = {tensor.name for tensor in proto.graph.initializer}  # whose types and shapes onnx-ir writes a second time
        kept = [info for info in proto.graph.value_info if info.name not in stored]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
        data = proto.SerializeToString()
    except Exception as error:  # google.protobuf.message.EncodeError or a ValueError, by version
        raise ModelError(f"{path}: cannot be one file (protobuf holds at most 2 GB): {str(error)[:200]}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
