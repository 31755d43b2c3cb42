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
import onnx_ir as ir

from torchopt.codecs import decode
from torchopt.codecs.encoding import DOMAIN
from torchopt.errors import FileError
from torchopt.onnx_file.older import newer
from torchopt.onnx_file.read import read
from torchopt.onnx_file.serialize import copied, write
from torchopt.onnx_file.strip import strip_notes
from torchopt.onnx_file.view import Scope, View, scopes_of
from torchopt.pack.decoded import weight_values
from torchopt.pack.decoder_calls import Call, read_encoding
from torchopt.pack.dense_form import ADDED, VERSION, ordered, recalled
from torchopt.pack.in_place import OLDEST_OPSET, WITHOUT, pack_model, smaller
from torchopt.pack.joined_calls import CUT_KIND, CutCall, check_sizes, is_joined
from torchopt.pack.packable import opset_of, packable
from torchopt.pack.proof import prove
from torchopt.pack.report import PackReport


def pack(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, strip: bool = False, smallest: bool = False) -> PackReport:
    """Write `src` with its weights packed to `dst`; the decoded weights equal the source's bit for bit.

    Before `dst` gets its name, the file is read again: ONNX Runtime decodes every packed weight, and these, all other tensors and all
    nodes are compared with the source. Outputs are then equal too, but for the last bit where the report's `inlined` names operators.
    A file with nothing to pack is written as it is, byte for byte. One of opset 7 to 11 is first converted to 12 by onnx, which must
    not change a bit of what ONNX Runtime gives on random inputs.

    Args:
        src: any ONNX file.
        dst: the file to write; the same path as `src` is fine.
        strip: leave out what torch's exporter notes on nodes and values (source lines, module names), which no runtime reads.
        smallest: put codes near their entropy, in Huffman codes that ONNX Runtime decodes at load, where the file gets smaller by it.
            Loading takes longer then, about 0.3 s and 200 to 400 MB for a million weights; the network runs as fast afterwards.

    Raises:
        FileError: `src` is missing or no ONNX file, or `dst` cannot be written.
        ModelError: the model's opset is too old or unknown, or what was written is not equal to the source.
    """
    source, target = Path(src), Path(dst)
    model = read(source)
    opset = opset_of(model) or WITHOUT
    if opset >= OLDEST_OPSET or not packable(View(model), opset)[0]:
        return _pack_file(model, source, source, target, strip, smallest)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / source.name
        newer(source, converted, opset, OLDEST_OPSET)
        return _pack_file(read(converted), converted, source, target, strip, smallest)


def _pack_file(model: ir.Model, read_from: Path, source: Path, target: Path, strip: bool, smallest: bool) -> PackReport:
    """Pack a model that was read from a file, the source itself or what it was converted to, and write it to the target."""
    report = pack_model(model, keep=True)
    if smallest:
        model, report = smaller(model, report, read(read_from), keep=True)
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


def unpack_model(model: ir.Model, where: str) -> None:
    """Make every packed weight of `model` an ordinary constant again, in place; each is decoded when its value is asked for.

    Args:
        model: as `read` gives it.
        where: the file that an error names, also a later one of a weight that proves damaged when it is decoded.

    Raises:
        FileError: a packed weight is damaged.
    """
    for scope in list(scopes_of(model)):
        calls = [node for node in scope.body if node.domain == DOMAIN and not is_joined(node)]
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


def check_calls(model: ir.Model, where: str) -> None:
    """See that the sizes of each call that decodes are possible, before a runtime is given it: ONNX Runtime aborts on some that lie.

    Raises:
        FileError: a packed weight is damaged.
    """
    for scope in scopes_of(model):
        for node in (node for node in scope.body if node.domain == DOMAIN):
            with _damage(where, f"the packed weight {node.outputs[0].name if node.outputs else node.name}"):
                check_sizes(node)


def _call_of(node: ir.Node) -> Call | CutCall:
    return CutCall.of(node) if node.op_type == CUT_KIND else Call.of(node)


def _restore(node: ir.Node, scope: Scope, where: str) -> ir.Value | None:
    """Put the dense tensor in the place of the call that decodes it; return the initializer, if it became one."""
    body = scope.body
    if len(node.outputs) != 1:
        raise FileError(f"{where}: the packed weight of node {node.name!r} is damaged ({len(node.outputs)} outputs)")
    output, parts = node.outputs[0], [v for v in node.inputs if v is not None]
    with _damage(where, f"the packed weight {output.name}"):
        call = _call_of(node)
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
        more = [v for v in node.inputs if v is not None]  # of a call that gave codes of several tensors
        node.graph.remove(node, safe=True)
        for below in more:
            _drop(below)
    elif graph is not None and part.name in graph.initializers and graph.initializers[str(part.name)] is part:
        graph.initializers.pop(str(part.name))


def _decoded(call: Call | CutCall, where: str, name: str) -> ir.TensorProtocol:
    with _damage(where, f"the packed weight {name}"):
        return ir.tensor(call.value() if isinstance(call, CutCall) else decode(read_encoding(call)), name=name)


@contextlib.contextmanager
def _damage(where: str, what: str) -> Iterator[None]:
    """Whatever decoding stumbles over is damage of the file."""
    try:
        yield
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, MemoryError) as error:
        raise FileError(f"{where}: {what} is damaged ({error})") from error
