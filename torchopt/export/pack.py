"""Pack and unpack any ONNX file: weights as codes, tables, masks and gaps, decoded by the runtime at load. Lossless both ways.

Each constant, in whatever scope it stands, is given its smallest encoding (`torchopt.packing`) and becomes one call of a model-local
function whose output has the constant's old name; nothing else in the graph changes. `unpack` finds those calls again and restores
the dense tensors. Before a file gets its name, `proof` reads it anew and compares all of it with its source.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from torchopt.errors import FileError, ModelError
from torchopt.export import marks
from torchopt.export.calls import Call, Names, read_encoding, replace
from torchopt.export.decoded import weight_values
from torchopt.export.decoders import DOMAIN, decodable, function_bytes, function_name
from torchopt.export.pack_report import LeftDense, PackedTensor, PackReport
from torchopt.export.packable import opset_of, packable
from torchopt.export.proof import prove
from torchopt.export.read import read, release
from torchopt.export.scopes import Constant, Scope, View, scopes_of
from torchopt.export.serialize import copied, write
from torchopt.packing import CALL_BYTES, Encoding, decode, encode, encodings, entropy_bytes

NEWEST_OPSET = onnx.defs.onnx_opset_version()
OLDEST_OPSET = 12  # integers as attributes
WITHOUT = 21  # the opset of decoders in a model that has no operators of ONNX's own set
FUNCTIONS = 8  # the version of the file format that has model-local functions
SMALL = 1 << 18  # bytes of a tensor below which the cost of its decoder counts


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> PackReport:
    """Write `src` with its weights packed to `dst`; the decoded weights equal the source's bit for bit.

    Before `dst` gets its name, the file is read again: ONNX Runtime decodes every packed weight, and these, all other tensors and all
    nodes are compared with the source. A file with nothing to pack is written as it is, byte for byte.

    Args:
        src: any ONNX file.
        dst: the file to write; the same path as `src` is fine.

    Raises:
        FileError: `src` is missing or no ONNX file, or `dst` cannot be written.
        ModelError: the model's opset is too old or unknown, or what was written is not equal to the source.
    """
    model = read(src)
    report = pack_model(model, keep=True)
    if report.rows or not copied(model, Path(src), Path(dst)):
        write(model, dst, check=lambda path: prove(Path(src), path, f"pack: {dst}"))
    return report


def unpack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Write `src` with every packed weight dense again to `dst`: the inverse of `pack`.

    Nodes, tensors, names, documentation, metadata and their order are those of the file that was packed. Bytes may differ: a tensor
    whose numbers were fields of the message, or sparse, comes back as bytes; a model that was converted from an opset below 12 stays
    converted; and what ONNX's format does not define is not kept.

    Raises:
        FileError: `src` is missing, damaged, or no ONNX file, or `dst` cannot be written.
        ModelError: what was written is not equal to the source.
    """
    model = read(src)
    unpack_model(model, str(src))
    write(model, dst, check=lambda path: prove(path, Path(src), f"unpack: {dst}"))


def decode_initializers(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the value of each weight of an ONNX file: unpacked, and integers times their scale, by the initializer's name.

    Raises:
        FileError: the file is missing, damaged, or no ONNX file.
    """
    model = read(path)
    unpack_model(model, str(path))
    with _damage(str(path), "a weight or its scale"):
        return weight_values(model)


def pack_model(model: ir.Model, *, keep: bool = False) -> PackReport:
    """Pack the weights of `model` in place.

    Args:
        model: the graph.
        keep: remember documentation, metadata and order of what is packed, for `unpack`.

    Raises:
        ModelError: the opset is too old or unknown.
    """
    opset = opset_of(model) or WITHOUT
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(f"pack: the model has opset {opset}; convert it to one of {OLDEST_OPSET} to {NEWEST_OPSET}")
    view = View(model)
    weights, left = packable(view, opset)
    orders = {id(scope.body): list(scope.body.initializers) for scope in view.scopes if isinstance(scope.body, ir.Graph)}
    rows, names, calls = {}, Names(view), list[ir.Node]()
    for name, encoding in _chosen(weights, opset):
        dense = _values(weights[name])
        rows[name] = PackedTensor(
            name=name,
            codec=encoding.name,
            dense_bytes=dense.nbytes,
            packed_bytes=encoding.payload_bytes,
            entropy_bytes=entropy_bytes(dense, encoding),
        )
        call = replace(model, weights[name], encoding, opset, names)
        if keep:
            marks.remember(call, weights[name])
        calls.append(call)
        del dense, encoding  # before the next one is made
        release(model)
    if rows:
        _raise_versions(model, keep)
    if keep:
        _remember_orders(view, orders, {id(call) for call in calls})
    left += [
        LeftDense(name=name, dense_bytes=_tensor(constant).nbytes, reason="no smaller form")
        for name, constant in weights.items()
        if name not in rows
    ]
    return PackReport(rows=[rows[name] for name in weights if name in rows], left=left)


def _raise_versions(model: ir.Model, keep: bool) -> None:
    """Name what decoders need: a file format with functions, and ONNX's own operators."""
    if keep and model.ir_version < FUNCTIONS:
        model.metadata_props[marks.VERSION] = str(model.ir_version)
    model.ir_version = max(model.ir_version, FUNCTIONS)
    if opset_of(model) is None:
        model.opset_imports[""] = WITHOUT
        if keep:
            model.metadata_props[marks.ADDED] = ""


def _remember_orders(view: View, orders: dict[int, list[str]], calls: set[int]) -> None:
    for scope in view.scopes:
        if isinstance(scope.body, ir.Graph):
            made = [node for node in scope.body if id(node) in calls and marks.NODE not in node.metadata_props]
            marks.remember_order(scope.body, orders[id(scope.body)], made)


def _chosen(weights: dict[str, Constant], opset: int) -> Iterator[tuple[str, Encoding]]:
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
    kinds = _worth_their_decoders(options, sizes, given, {n: _tensor(weights[n]).nbytes for n in options})
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


def _tensor(constant: Constant) -> ir.TensorProtocol:
    assert constant.tensor is not None
    return constant.tensor


def _values(constant: Constant) -> np.ndarray:
    return _tensor(constant).numpy()


def unpack_model(model: ir.Model, where: str) -> None:
    """Make every packed weight of `model` an ordinary constant again, in place; each is decoded when its value is asked for.

    Args:
        model: as `read` gives it.
        where: the file that an error names, also a later one of a weight that proves damaged when it is decoded.

    Raises:
        FileError: a packed weight is damaged.
    """
    for scope in list(scopes_of(model)):
        calls = [node for node in scope.body if node.domain == DOMAIN]
        restored = [made for node in calls if (made := _restore(node, scope, where)) is not None]
        if isinstance(scope.body, ir.Graph):
            marks.ordered(scope.body, restored)
        if isinstance(scope.body, ir.Function):
            scope.body.opset_imports.pop(DOMAIN, None)
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)
    version = model.metadata_props.pop(marks.VERSION, "")
    model.ir_version = int(version) if version.isdecimal() else model.ir_version
    if marks.ADDED in model.metadata_props:
        del model.metadata_props[marks.ADDED]
        model.opset_imports.pop("", None)


def _restore(node: ir.Node, scope: Scope, where: str) -> ir.Value | None:
    """Put the dense tensor in the place of the call that decodes it; return the initializer, if it became one."""
    body = scope.body
    if len(node.outputs) != 1:
        raise FileError(f"{where}: the packed weight of node {node.name!r} is damaged ({len(node.outputs)} outputs)")
    output, parts = node.outputs[0], [v for v in node.inputs if v is not None]
    with _damage(where, f"the packed weight {output.name}"):
        call = Call.of(node)
    decoded = functools.partial(_decoded, call, where, str(output.name))
    dense = ir.LazyTensor(decoded, call.dtype, ir.Shape(call.shape), name=output.name)
    constant = marks.recalled(node, dense)
    if constant is None and isinstance(body, ir.Function):
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", dense)])
    if constant is None:
        value = ir.Value(name=output.name, const_value=dense, shape=ir.Shape(call.shape), type=ir.TensorType(call.dtype))
    else:
        body.insert_before(node, constant)
        value = constant.outputs[0]
        value.name, value.shape, value.type = output.name, output.shape, output.type
    value.doc_string = output.doc_string
    value.metadata_props.update(output.metadata_props)
    value.meta.update(output.meta)
    for user, index in list(output.uses()):
        user.replace_input_with(index, value)
    body.remove(node, safe=True)
    output.name = None
    for part in parts:
        _drop(part)
    return value if constant is None else None


def _drop(part: ir.Value) -> None:
    """Remove a constant that only decoding read."""
    graph, node = part.graph, part.producer()
    if list(part.uses()):
        return
    if node is not None and node.graph is not None:
        node.graph.remove(node, safe=True)
    elif graph is not None and part.name in graph.initializers and graph.initializers[str(part.name)] is part:
        graph.initializers.pop(str(part.name))


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
