"""Pack and unpack any ONNX file: weights as codes, tables, masks and gaps, decoded by the runtime at load. Lossless both ways.

Each initializer is given its smallest encoding (`torchopt.packing`) and becomes one call of a model-local function whose output
has the initializer's old name; nothing else in the graph changes. `unpack` finds those calls again and restores the dense tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from torchopt.errors import FileError, ModelError
from torchopt.export.calls import Names, read_encoding, replace
from torchopt.export.decoded import weight_values
from torchopt.export.decoders import DOMAIN, decodable, function_bytes, function_name
from torchopt.export.pack_report import LeftDense, PackedTensor, PackReport
from torchopt.export.packable import packable
from torchopt.export.read import read
from torchopt.export.serialize import serialized
from torchopt.files import atomic_path
from torchopt.packing import CALL_BYTES, Encoding, decode, encode, encodings, entropy_bytes

NEWEST_OPSET = onnx.defs.onnx_opset_version()
OLDEST_OPSET = 12  # integers as attributes
FUNCTIONS = 8  # the version of the file format that has model-local functions
SMALL = 1 << 18  # bytes of a tensor below which the cost of its decoder counts


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> PackReport:
    """Write `src` with its weights packed to `dst`; outputs stay bit-equal.

    Args:
        src: any ONNX file.
        dst: the file to write; the same path as `src` is fine.

    Raises:
        FileError: `src` is missing or no ONNX file, or `dst` cannot be written.
        ModelError: the model's opset is too old or unknown.
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
        ModelError: the opset is too old or unknown.
    """
    opset = model.opset_imports.get("", 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(f"pack: the model has opset {opset}; convert it to one of {OLDEST_OPSET} to {NEWEST_OPSET}")
    weights, left = packable(model)
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
    if rows:
        model.ir_version = max(model.ir_version, FUNCTIONS)
    left += [
        LeftDense(name=name, dense_bytes=value.const_value.nbytes, reason="no smaller form")  # type: ignore[union-attr]
        for name, value in weights.items()
        if name not in rows
    ]
    return PackReport(rows=[rows[name] for name in weights if name in rows], left=left)


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
            options[name] = [e for e in encodings(dense) if decodable(e, opset)]
        elif (encoding := encode(dense, lambda e: decodable(e, opset))) is not None:
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


def _write(model: ir.Model, path: str | os.PathLike[str]) -> None:
    data = serialized(model, str(path))
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
