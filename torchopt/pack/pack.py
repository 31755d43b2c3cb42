"""Pack and unpack any ONNX file: weights as codes, tables, masks and gaps, decoded by the runtime at load. Lossless both ways.

Each constant, in whatever scope it stands, is given its smallest encoding (`torchopt.codecs`) and becomes one call of a model-local
function whose output has the constant's old name; nothing else in the graph changes. `unpack` finds those calls again and restores
the dense tensors. Before a file gets its name, `proof` reads it anew and compares all of it with its source.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from torchopt.codecs import decode, entropy_bytes
from torchopt.codecs.encoding import DOMAIN
from torchopt.errors import FileError, ModelError
from torchopt.onnx_file.inlined import written_out
from torchopt.onnx_file.older import newer
from torchopt.onnx_file.read import read, release
from torchopt.onnx_file.serialize import copied, write
from torchopt.onnx_file.strip import strip_notes
from torchopt.onnx_file.view import Scope, View, scopes_of
from torchopt.pack.choose import chosen, tensor_of, values_of
from torchopt.pack.decoded import weight_values
from torchopt.pack.decoder_calls import Call, Names, read_encoding, replace
from torchopt.pack.dense_form import ADDED, NODE, VERSION, ordered, recalled, remember, remember_order
from torchopt.pack.packable import opset_of, packable
from torchopt.pack.proof import prove
from torchopt.pack.report import LeftDense, PackedTensor, PackReport

NEWEST_OPSET = onnx.defs.onnx_opset_version()
OLDEST_OPSET = 12  # integers as attributes
WITHOUT = 21  # the opset of decoders in a model that has no operators of ONNX's own set
FUNCTIONS = 8  # the version of the file format that has model-local functions


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, strip: bool = False) -> PackReport:
    """Write `src` with its weights packed to `dst`; the decoded weights equal the source's bit for bit.

    Before `dst` gets its name, the file is read again: ONNX Runtime decodes every packed weight, and these, all other tensors and all
    nodes are compared with the source. Outputs are then equal too, but for the last bit where the report's `inlined` names operators.
    A file with nothing to pack is written as it is, byte for byte. One of opset 7 to 11 is first converted to 12 by onnx, which must
    not change a bit of what ONNX Runtime gives on random inputs.

    Args:
        src: any ONNX file.
        dst: the file to write; the same path as `src` is fine.
        strip: leave out what torch's exporter notes on nodes and values (source lines, module names), which no runtime reads.

    Raises:
        FileError: `src` is missing or no ONNX file, or `dst` cannot be written.
        ModelError: the model's opset is too old or unknown, or what was written is not equal to the source.
    """
    source, target = Path(src), Path(dst)
    model = read(source)
    opset = opset_of(model) or WITHOUT
    if opset >= OLDEST_OPSET or not packable(View(model), opset)[0]:
        return _pack_file(model, source, source, target, strip)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / source.name
        newer(source, converted, opset, OLDEST_OPSET)
        return _pack_file(read(converted), converted, source, target, strip)


def _pack_file(model: ir.Model, read_from: Path, source: Path, target: Path, strip: bool) -> PackReport:
    """Pack a model that was read from a file, the source itself or what it was converted to, and write it to the target."""
    report = pack_model(model, keep=True)
    stripped = strip and strip_notes(model)
    if report.rows or stripped or not copied(model, source, target):
        write(model, target, check=lambda path: prove(read_from, path, f"pack: {target}"))
    return report


def unpack(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Write `src` with every packed weight dense again to `dst`: the inverse of `pack`.

    Nodes, tensors, names, documentation, metadata and their order are those of the file that was packed. Bytes may differ: a tensor
    whose numbers were fields of the message, or sparse, comes back as bytes; a model that was converted from an opset below 12 stays
    converted; and fields that say their default, or that ONNX's format does not define, are not kept.

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
    view = View(model)
    weights, left = packable(view, opset)
    if weights and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(f"pack: the model has opset {opset}; convert it to one of {OLDEST_OPSET} to {NEWEST_OPSET}")
    orders = {id(scope.body): list(scope.body.initializers) for scope in view.scopes if isinstance(scope.body, ir.Graph)}
    rows, names, calls = {}, Names(view), list[ir.Node]()
    for name, encoding in chosen(weights, opset):
        dense = values_of(weights[name])
        rows[name] = PackedTensor(
            name=name,
            codec=encoding.name,
            dense_bytes=dense.nbytes,
            packed_bytes=encoding.payload_bytes,
            entropy_bytes=entropy_bytes(dense, encoding),
        )
        call = replace(model, weights[name], encoding, opset, names)
        if keep:
            remember(call, weights[name])
        calls.append(call)
        del dense, encoding  # before the next one is made
        release(model)
    if rows:
        _raise_versions(model, keep)
    if keep:
        _remember_orders(view, orders, {id(call) for call in calls})
    left += [
        LeftDense(name=name, dense_bytes=tensor_of(constant).nbytes, reason="no smaller form")
        for name, constant in weights.items()
        if name not in rows
    ]
    found = [rows[name] for name in weights if name in rows]
    return PackReport(rows=found, left=left, inlined=written_out(model, view) if found else ())


def _raise_versions(model: ir.Model, keep: bool) -> None:
    """Name what decoders need: a file format with functions, and ONNX's own operators."""
    if keep and model.ir_version < FUNCTIONS:
        model.metadata_props[VERSION] = str(model.ir_version)
    model.ir_version = max(model.ir_version, FUNCTIONS)
    if opset_of(model) is None:
        model.opset_imports[""] = WITHOUT
        if keep:
            model.metadata_props[ADDED] = ""


def _remember_orders(view: View, orders: dict[int, list[str]], calls: set[int]) -> None:
    for scope in view.scopes:
        if isinstance(scope.body, ir.Graph):
            made = [node for node in scope.body if id(node) in calls and NODE not in node.metadata_props]
            remember_order(scope.body, orders[id(scope.body)], made)


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
            ordered(scope.body, restored)
        if isinstance(scope.body, ir.Function):
            scope.body.opset_imports.pop(DOMAIN, None)
    for key in [k for k in model.functions if k[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)
    version = model.metadata_props.pop(VERSION, "")
    model.ir_version = int(version) if version.isdecimal() else model.ir_version
    if ADDED in model.metadata_props:
        del model.metadata_props[ADDED]
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
    constant = recalled(node, dense)
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
