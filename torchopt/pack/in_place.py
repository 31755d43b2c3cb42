"""Packing in memory: what each constant of a graph becomes, and the smaller of two ways.

`pack_model` gives constants their encodings in place, together or each by itself.
Huffman codes are not always smaller, since the functions that decode them take some three kilobytes: which file is, is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from torchopt.codecs import entropy_bytes
from torchopt.errors import ModelError
from torchopt.onnx_file.inlined import written_out
from torchopt.onnx_file.read import release
from torchopt.onnx_file.serialize import size_of
from torchopt.onnx_file.view import Constant, View
from torchopt.pack.choose import chosen, tensor_of, values_of
from torchopt.pack.decoder_calls import Names, replace
from torchopt.pack.dense_form import ADDED, NODE, VERSION, remember, remember_order
from torchopt.pack.joined_calls import cut_call, joined_call
from torchopt.pack.packable import opset_of, packable
from torchopt.pack.report import LeftDense, PackedTensor, PackReport
from torchopt.pack.together import groups

NEWEST_OPSET = onnx.defs.onnx_opset_version()
OLDEST_OPSET = 12  # integers as attributes
WITHOUT = 21  # the opset of decoders in a model that has no operators of ONNX's own set
FUNCTIONS = 8  # the version of the file format that has model-local functions


def smaller(
    model: ir.Model, report: PackReport, again: ir.Model | bytes, *, keep: bool = False, shapes: bool = True
) -> tuple[ir.Model, PackReport]:
    """Return the smaller of two files, each with what packing did: a packed one, and the same one packed with Huffman codes too.

    Args:
        model: the first.
        report: of it.
        again: the same before packing, which is packed in place; or its bytes.
        keep: as in `pack_model`.
        shapes: as in `serialized`.
    """
    if isinstance(again, bytes):
        again = ir.serde.deserialize_model(onnx.ModelProto.FromString(again))
    other = pack_model(again, keep=keep, smallest=True)
    if size_of(again, "pack", shapes=shapes) < size_of(model, "pack", shapes=shapes):
        return again, other
    return model, report


def pack_model(model: ir.Model, *, keep: bool = False, smallest: bool = False) -> PackReport:
    """Pack the weights of `model` in place.

    Args:
        model: the graph.
        keep: remember documentation, metadata and order of what is packed, for `unpack`.
        smallest: use Huffman codes where they take less.

    Raises:
        ModelError: the opset is too old or unknown.
    """
    opset = opset_of(model) or WITHOUT
    view = View(model)
    weights, left = packable(view, opset)
    if weights and not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ModelError(f"pack: the model has opset {opset}; convert it to one of {OLDEST_OPSET} to {NEWEST_OPSET}")
    orders = {id(scope.body): list(scope.body.initializers) for scope in view.scopes if isinstance(scope.body, ir.Graph)}
    rows, calls = {}, list[ir.Node]()
    for row, call in _replaced(model, view, weights, opset, smallest=smallest):
        rows[row.name] = row
        if keep:
            remember(call, weights[row.name])
        calls.append(call)
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


def _replaced(
    model: ir.Model, view: View, weights: dict[str, Constant], opset: int, *, smallest: bool
) -> Iterator[tuple[PackedTensor, ir.Node]]:
    """Put calls in the place of constants: of groups first, then of those that are packed by themselves."""
    names, rest = Names(view), dict(weights)
    for group in groups(weights, model.graph, opset, smallest=smallest):
        codes = joined_call(model, group.form, opset, names)
        for member in group.members:
            value = values_of(rest.pop(member.name))
            row = PackedTensor(
                name=member.name,
                codec=f"together {group.form.name}",
                dense_bytes=value.nbytes,
                packed_bytes=group.bytes_of(member, value.size),
                entropy_bytes=entropy_bytes(value),
            )
            yield row, cut_call(weights[member.name], codes, names.constant(model.graph, ir.tensor(member.table)), member.start)
    for name, encoding in chosen(rest, opset):
        dense = values_of(weights[name])
        row = PackedTensor(
            name=name,
            codec=encoding.name,
            dense_bytes=dense.nbytes,
            packed_bytes=encoding.payload_bytes,
            entropy_bytes=entropy_bytes(dense, encoding),
        )
        yield row, replace(model, weights[name], encoding, opset, names)
        del dense, encoding  # before the next one is made


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
