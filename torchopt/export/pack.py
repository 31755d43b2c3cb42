"""Pack and unpack any ONNX file: weights as codes, tables, masks and gaps, decoded by the runtime at load. Lossless both ways.

Each initializer is given its smallest encoding (`torchopt.packing`) and becomes one call of a model-local function whose output
has the initializer's old name; nothing else in the graph changes. `unpack` finds those calls again and restores the dense tensors.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from torchopt.errors import FileError, ModelError
from torchopt.export.calls import Call, Names, read_encoding, replace
from torchopt.export.decoded import weight_values
from torchopt.export.decoders import DOMAIN, decodable, function_bytes, function_name
from torchopt.export.pack_report import LeftDense, PackedTensor, PackReport
from torchopt.export.packable import packable
from torchopt.export.read import read, release
from torchopt.export.serialize import write
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
    write(model, dst)
    return report


def unpack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Write `src` with every packed weight dense again to `dst`: the exact inverse of `pack`.

    Raises:
        FileError: `src` is missing, damaged, or no ONNX file, or `dst` cannot be written.
    """
    model = read(src)
    unpack_model(model, str(src))
    write(model, dst)


def decode_initializers(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the value of each weight of an ONNX file: unpacked, and integers times their scale, by the initializer's name.

    Raises:
        FileError: the file is missing, damaged, or no ONNX file.
    """
    model = read(path)
    unpack_model(model, str(path))
    with _damage(str(path), "a weight or its scale"):
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
        dense = _values(weights[name])
        rows[name] = PackedTensor(
            name=name,
            codec=encoding.name,
            dense_bytes=dense.nbytes,
            packed_bytes=encoding.payload_bytes,
            entropy_bytes=entropy_bytes(dense, encoding),
        )
        replace(model, weights[name], encoding, opset, names)
        del dense, encoding  # before the next one is made
        release(model)
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
    options: dict[
        str, dict[str, int]
    ] = {}  # bytes of a small tensor by the kind that it would be packed as; one is made in the end
    sizes: dict[str, dict[str, int]] = {}
    for name, value in weights.items():
        dense = _values(value)
        if dense.nbytes < SMALL:
            options[name] = {}
            for e in (e for e in encodings(dense) if decodable(e, opset)):
                kind = function_name(e, opset)
                options[name][kind] = min(e.payload_bytes, options[name].get(kind, dense.nbytes))
                sizes[kind] = function_bytes(e, opset)
        elif (encoding := encode(dense, lambda e: decodable(e, opset))) is not None:
            given |= {*function_bytes(encoding, opset)}
            yield name, encoding
            del encoding
    kinds = _worth_their_decoders(options, sizes, given, {n: weights[n].const_value.nbytes for n in options})  # type: ignore[union-attr]
    for name in options:
        if any(kind in kinds for kind in options[name]):
            encoding = encode(_values(weights[name]), lambda e: decodable(e, opset) and function_name(e, opset) in kinds)
            assert encoding is not None
            yield name, encoding


def _worth_their_decoders(
    options: dict[str, dict[str, int]], sizes: dict[str, dict[str, int]], given: set[str], dense: dict[str, int]
) -> set[str]:
    """The kinds of encodings with which the small tensors and their decoders take the fewest bytes."""

    def cost(kinds: set[str]) -> int:
        best = {n: min((size for kind, size in found.items() if kind in kinds), default=None) for n, found in options.items()}
        tensors = sum(dense[n] if size is None else size + CALL_BYTES for n, size in best.items())
        needed = {name: size for kind in kinds for name, size in sizes[kind].items() if name not in given}
        return tensors + sum(needed.values())

    kinds = set(sizes)
    while droppable := sorted(kinds - given):
        least, kind = min((cost(kinds - {kind}), kind) for kind in droppable)
        if least >= cost(kinds):
            break
        kinds.remove(kind)
    return kinds


def _values(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def unpack_model(model: ir.Model, where: str) -> None:
    """Make every packed weight of `model` an ordinary initializer again, in place; each is decoded when its value is asked for.

    Args:
        model: as `read` gives it.
        where: the file that an error names, also a later one of a weight that proves damaged when it is decoded.

    Raises:
        FileError: a packed weight is damaged.
    """
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        if len(node.outputs) != 1:
            raise FileError(f"{where}: the packed weight of node {node.name!r} is damaged ({len(node.outputs)} outputs)")
        output, parts = node.outputs[0], [v for v in node.inputs if v is not None]
        with _damage(where, f"the packed weight {output.name}"):
            call = Call.of(node)
        decoded = functools.partial(_decoded, call, where, str(output.name))
        dense = ir.LazyTensor(decoded, call.dtype, ir.Shape(call.shape), name=output.name)
        initializer = ir.Value(name=output.name, const_value=dense, shape=ir.Shape(call.shape), type=ir.TensorType(call.dtype))
        initializer.meta.update(output.meta)
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


def _decoded(call: Call, where: str, name: str) -> ir.TensorProtocol:
    with _damage(where, f"the packed weight {name}"):
        return ir.tensor(decode(read_encoding(call)), name=name)


@contextlib.contextmanager
def _damage(where: str, what: str) -> Iterator[None]:
    """Whatever decoding stumbles over is damage of the file."""
    try:
        yield
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError) as error:
        raise FileError(f"{where}: {what} is damaged ({error})") from error
