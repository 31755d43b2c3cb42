"""The proof that a packed file is its source: both are read again as `onnx` reads them, and ONNX Runtime decodes every packed weight.

Nothing here shares code with the reading and writing that it looks at (but for where a second file may lie, and what a sparse tensor
means). The two files must have the same graphs, functions, nodes and
tensors, bit for bit, but for the calls that decode; and what each call gives must be the source's tensor. The calls are run by ONNX
Runtime itself, some at a time, in small models of their own: that is the runtime that the packed file will be decoded by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from torchopt.codecs.encoding import DOMAIN
from torchopt.errors import ModelError
from torchopt.onnx_file.read import beside
from torchopt.onnx_file.sparse import densify, densify_nodes

AT_ONCE = 1 << 24  # bytes of dense tensors that are decoded in one session


class _DifferentError(Exception):
    """What differs, in words."""


@dataclass(frozen=True)
class _Packed:
    """A packed weight: the call that gives it, the one that its codes come from if it is cut out, their constants, the source's tensor."""

    call: NodeProto
    codes: NodeProto | None
    parts: dict[str, TensorProto]
    dense: TensorProto


@dataclass
class _File:
    """A file as `onnx` reads it; sparse tensors made dense."""

    path: Path | None
    model: ModelProto
    calls: list[_Packed] = field(default_factory=list)

    @classmethod
    def read(cls, source: Path | bytes) -> _File:
        if isinstance(source, bytes):
            model, path = ModelProto.FromString(source), None
        else:
            model, path = onnx.load_model(source, load_external_data=False), source
        densify(model.graph)
        for function in model.functions:
            densify_nodes(function.node)
        return cls(path=path, model=model)

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The tensor's values; those of another file are read from there."""
        if tensor.data_location != TensorProto.EXTERNAL or self.path is None:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        with open(beside(self.path, where["location"]), "rb") as file:
            file.seek(int(where.get("offset", 0)))
            size = -(-int(np.prod(tensor.dims, dtype=np.int64)) * _bits(tensor.data_type) // 8)
            whole = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=file.read(size))
        return numpy_helper.to_array(whole)


def prove(dense: Path | bytes, packed: Path | bytes, where: str) -> None:
    """Compare a dense file with its packed form.

    Args:
        dense: the file as it was, or as unpacking gave it back; or its bytes.
        packed: the other one.
        where: what the error names.

    Raises:
        ModelError: they are not equal, or one cannot be read, or ONNX Runtime cannot decode a weight.
    """
    try:
        one, other = _File.read(dense), _File.read(packed)
        _compare(one, other)
        _compare_decoded(one, other)
    except _DifferentError as error:
        raise ModelError(f"{where}: the file would not be equal to its source: {error}; nothing was written") from error
    except Exception as error:  # onnx, protobuf and ONNX Runtime raise classes of their own
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
        raise ModelError(f"{where}: the file cannot be read again: {reason}; nothing was written") from error


def _compare(one: _File, other: _File) -> None:
    _compare_graphs(one, one.model.graph, other, other.model.graph, {})
    ours = {(f.domain, f.name, f.overload): f for f in other.model.functions if f.domain != DOMAIN}
    theirs = {(f.domain, f.name, f.overload): f for f in one.model.functions if f.domain != DOMAIN}
    if set(ours) != set(theirs):
        raise _DifferentError("it has other functions")
    for key, function in theirs.items():
        if (function.input, function.output, function.attribute) != (ours[key].input, ours[key].output, ours[key].attribute):
            raise _DifferentError(f"function {function.name!r} takes or gives something else")
        _compare_bodies(one, function.node, {}, other, ours[key].node, {}, {})


def _compare_graphs(one: _File, a: GraphProto, other: _File, b: GraphProto, outer: dict[str, TensorProto]) -> None:
    """Graphs: inputs, outputs, then tensors and nodes. `outer` has the constants of the packed file that the graph sees."""
    for ours, theirs in ((b.input, a.input), (b.output, a.output)):
        if [(v.name, v.type.SerializeToString()) for v in ours] != [(v.name, v.type.SerializeToString()) for v in theirs]:
            raise _DifferentError(f"graph {a.name!r} takes or gives something else")
    _compare_bodies(one, a.node, {t.name: t for t in a.initializer}, other, b.node, {t.name: t for t in b.initializer}, outer)


def _compare_bodies(
    one: _File,
    a: Any,
    before: dict[str, TensorProto],
    other: _File,
    b: Any,
    after: dict[str, TensorProto],
    outer: dict[str, TensorProto],
) -> None:
    seen = (
        outer
        | after
        | {n.output[0]: n.attribute[0].t for n in b if n.op_type == "Constant" and n.attribute and n.attribute[0].HasField("t")}
    )
    made = {node.output[0]: node for node in b if node.domain == DOMAIN}
    cut_from = {name for node in made.values() for name in node.input if name in made}
    calls = {name: node for name, node in made.items() if name not in cut_from}
    if cut_from & ({*before} | {name for node in b if node.domain != DOMAIN for name in node.input}):
        raise _DifferentError(f"the codes {min(cut_from)!r} are read by other nodes")
    constants = {n.output[0]: _value(n) for n in a if n.op_type == "Constant" and n.output and n.output[0] in calls}
    parts = {name for node in b if node.domain == DOMAIN for name in node.input}
    for name, call in calls.items():
        dense = before.get(name, constants.get(name))
        if dense is None:
            raise _DifferentError(f"{name!r} is packed, and its source has no such tensor")
        codes = next((made[part] for part in call.input if part in cut_from), None)
        read = [*call.input, *(codes.input if codes is not None else ())]
        other.calls.append(_Packed(call, codes, {part: seen[part] for part in read if part not in cut_from}, dense))
    for name, tensor in before.items():
        if name not in calls:
            if name not in after:
                raise _DifferentError(f"tensor {name!r} is missing")
            _compare_tensors(one, tensor, other, after[name], name)
    added = {name for name in after if name not in before and name not in parts}
    if added - _parts_below(b):
        raise _DifferentError(f"tensor {min(added)!r} was added")
    ours = [n for n in b if n.domain != DOMAIN and not (n.op_type == "Constant" and n.output[0] in parts)]
    theirs = [n for n in a if not (n.op_type == "Constant" and n.output and n.output[0] in constants)]
    if len(ours) != len(theirs):
        raise _DifferentError(f"it has {len(ours)} nodes, its source {len(theirs)}")
    for node, source in zip(ours, theirs, strict=True):
        _compare_nodes(one, source, other, node, seen)


def _compare_nodes(one: _File, a: NodeProto, other: _File, b: NodeProto, seen: dict[str, TensorProto]) -> None:
    name = a.name or (a.output[0] if a.output else a.op_type)
    if _signature(a) != _signature(b):
        raise _DifferentError(f"node {name!r} reads, gives or is something else")
    ours, theirs = ({x.name: x for x in node.attribute} for node in (b, a))
    if set(ours) != set(theirs):
        raise _DifferentError(f"node {name!r} has other attributes")
    for key, value in theirs.items():
        if value.ref_attr_name:
            same = value.ref_attr_name == ours[key].ref_attr_name
        elif value.HasField("t"):
            _compare_tensors(one, value.t, other, ours[key].t, f"{name}.{key}")
            continue
        elif value.HasField("g") or value.graphs:
            for x, y in zip(
                [value.g] if value.HasField("g") else value.graphs,
                [ours[key].g] if value.HasField("g") else ours[key].graphs,
                strict=True,
            ):
                _compare_graphs(one, x, other, y, seen)
            continue
        else:
            same = _plain(value) == _plain(ours[key])
        if not same:
            raise _DifferentError(f"attribute {key!r} of node {name!r} differs")


def _signature(node: NodeProto) -> tuple[Any, ...]:
    """What a node is, reads and gives; names that are left out at the end may be left out altogether."""
    names = [[*node.input], [*node.output]]
    for side in names:
        while side and not side[-1]:
            side.pop()
    return node.op_type, "" if node.domain == "ai.onnx" else node.domain, node.overload, *names


def _plain(attribute: AttributeProto) -> Any:
    """The value of an attribute that is no tensor and no graph, as bytes: NaN equals NaN."""
    bare = AttributeProto()
    bare.CopyFrom(attribute)
    for key in ("doc_string", "type"):
        bare.ClearField(key)
    return bare.SerializeToString(deterministic=True)


def _value(node: NodeProto) -> TensorProto | None:
    return next((a.t for a in node.attribute if a.name == "value"), None)


def _parts_below(nodes: Any) -> set[str]:
    """What decoding calls in the subgraphs of nodes read."""
    found: set[str] = set()
    graphs = [g for n in nodes for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    for graph in graphs:  # it grows
        found.update(name for n in graph.node if n.domain == DOMAIN for name in n.input)
        graphs += [g for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    return found


def _bits(kind: int) -> int:
    return int(ir.DataType(kind).bitwidth)


def _compare_tensors(one: _File, a: TensorProto, other: _File, b: TensorProto, name: str) -> None:
    if (a.data_type, [*a.dims]) != (b.data_type, [*b.dims]):
        raise _DifferentError(f"tensor {name!r} has another type or shape")
    strings = a.data_type == TensorProto.STRING
    if not (a.string_data == b.string_data if strings else _equal(one.array(a), other.array(b))):
        raise _DifferentError(f"tensor {name!r} differs")


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    one, other = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return bool(np.array_equal(one, other))


def _compare_decoded(one: _File, other: _File) -> None:
    for group in _groups(one, other):
        outputs = _run(other, group)
        for packed, decoded in zip(group, outputs, strict=True):
            if not _equal(one.array(packed.dense), decoded):
                raise _DifferentError(
                    f"tensor {packed.call.output[0]!r}, decoded by ONNX Runtime {onnxruntime.__version__}, differs"
                )


def _groups(one: _File, other: _File) -> Iterator[list[_Packed]]:
    group: list[_Packed] = []
    size = 0
    for entry in other.calls:
        bytes_ = int(np.prod(entry.dense.dims, dtype=np.int64)) * _bits(entry.dense.data_type) // 8
        if group and size + bytes_ > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(entry)
        size += bytes_
    if group:
        yield group


def _run(other: _File, group: list[_Packed]) -> list[np.ndarray]:
    """What ONNX Runtime decodes, in a model that has nothing but these calls."""
    nodes, constants, outputs, shared = [], {}, [], dict[str, str]()

    def put(call: NodeProto, number: int, parts: dict[str, TensorProto], output: str) -> None:
        node = NodeProto(op_type=call.op_type, domain=call.domain, attribute=call.attribute, output=[output])
        for name in call.input:
            node.input.append(shared.get(name, f"{number}:{name}"))
            if name not in shared:
                constants[node.input[-1]] = numpy_helper.from_array(other.array(parts[name]), node.input[-1])
        nodes.append(node)

    for number, packed in enumerate(group):  # names are told apart: those of functions may be the same
        if packed.codes is not None and packed.codes.output[0] not in shared:
            put(packed.codes, number, packed.parts, f"codes{number}")
            shared[packed.codes.output[0]] = f"codes{number}"
        put(packed.call, number, packed.parts, f"out{number}")
        outputs.append(helper.make_tensor_value_info(f"out{number}", packed.dense.data_type, packed.dense.dims))
    graph = helper.make_graph(nodes, "decoded", [], outputs, list(constants.values()))
    ours = [f for f in other.model.functions if f.domain == DOMAIN]
    model = ModelProto(ir_version=other.model.ir_version, graph=graph, functions=ours, opset_import=ours[0].opset_import)
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # folding would only do the same earlier
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )  # a fallback would print
    return list(session.run(None, {}))
