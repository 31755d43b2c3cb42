"""The graph that ONNX Runtime really runs, and which of its nodes each node of a file became.

The runtime rewrites a graph at load: it fuses, folds, inlines functions and replaces groups by integer kernels. Its kernels keep the name
of the node that they are for, or a name with that in it. So the file is opened once with every node called by a mark of its own, and
the marks are looked for in the graph that the session writes. Convolutions in the runtime's blocked layout alone are called after
their output; from there the way leads back over the nodes that they absorbed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from torchopt.codecs.encoding import DOMAIN
from torchopt.errors import FileError
from torchopt.onnx_file.view import WEIGHTS, View
from torchopt.runtime.session import session

INTEGER = {
    *("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("DynamicQuantizeLSTM", "QAttention", "MatMulInteger16"),
}
BLOCKED = "_nchwc"  # how the runtime ends the name of a convolution in its blocked layout
ROUNDS = 4  # the accuracy_level at which MatMulNBits rounds its input too, and multiplies integers
MARK, DECODER = "torchopt_node_", "torchopt_decoder_"
INTEGER_ATTRIBUTES = ("accuracy_level", "bits")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One node of the graph that runs, of a kind that may have weights: its type, whether it multiplies integers."""

    kind: str
    integer: bool
    bits: int | None = None


@dataclass(kw_only=True)
class Ran:
    """What a file became.

    Attributes:
        kinds: how often each node type occurs.
        by_node: the kernels of a node of the file, by the node's identity.
        unknown: kernels that no node of the file could be found for.
        undecoded: types of the nodes that decode packed weights at each inference.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    by_node: dict[int, list[Kernel]] = field(default_factory=dict)
    unknown: list[Kernel] = field(default_factory=list)
    undecoded: list[str] = field(default_factory=list)


def ran(path: str | os.PathLike[str], model: ir.Model, view: View) -> Ran:
    """Open the file in ONNX Runtime, and return what runs.

    Args:
        path: the file.
        model: the same, read.
        view: of it.

    Raises:
        FileError: ONNX Runtime refuses it.
    """
    nodes = list(_nodes_of(model))
    optimized = _optimized(path, [id(node) for node in nodes])
    known, found, blocked = {id(node): node for node in nodes}, Ran(), list[tuple[str, Kernel]]()
    for node in optimized:
        found.kinds[node.op_type] += 1
        if DECODER in node.name or node.domain == DOMAIN:
            found.undecoded = sorted({*found.undecoded, node.op_type})
        if node.op_type not in WEIGHTS:
            continue
        kernel, marks = _kernel(node), [int(mark) for mark in re.findall(rf"{MARK}(\d+)_", node.name)]
        if marks:
            for mark in marks:
                if id(nodes[mark]) in known:
                    found.by_node.setdefault(id(nodes[mark]), []).append(kernel)
        elif BLOCKED in node.name:
            blocked.append((node.name, kernel))
        else:
            found.unknown.append(kernel)
    _find_blocked(blocked, view, found)
    return found


def _optimized(path: str | os.PathLike[str], marked: list[int]) -> list[onnx.NodeProto]:
    """The nodes that run, those of subgraphs included, from a file whose nodes are called by their number."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's classes; `read` has taken the file before
        raise FileError(f"{path}: is no whole ONNX file ({error})") from error
    roots = [proto.graph, *(f for f in proto.functions if f.domain != DOMAIN)]
    nodes = [node for root in roots for node in _nodes_in(root)]
    if len(nodes) != len(marked):
        raise FileError(f"{path}: is read as {len(marked)} nodes and holds {len(nodes)}; write it anew with onnx.save")
    for number, node in enumerate(nodes):
        node.name = f"{MARK}{number}_"
    for number, node in enumerate(n for f in proto.functions if f.domain == DOMAIN for n in f.node):
        node.name = f"{DECODER}{number}_"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        session(path, content=proto.SerializeToString(), optimized_to=target)
        return list(_nodes_in(onnx.load(str(target), load_external_data=False).graph))


def _nodes_in(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from _nodes_in(inner)


def _nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """The same nodes in the same order, as onnx-ir has them."""
    roots: list[ir.Graph | ir.Function] = [model.graph, *(f for f in model.functions.values() if f.domain != DOMAIN)]
    for root in roots:
        yield from _nodes_below(root)


def _nodes_below(body: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    for node in body:
        yield node
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes_below(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for graph in attribute.as_graphs():
                    yield from _nodes_below(graph)


def _kernel(node: onnx.NodeProto) -> Kernel:
    numbers = {a.name: a.i for a in node.attribute if a.name in INTEGER_ATTRIBUTES}
    rounds = node.op_type == "MatMulNBits" and numbers.get("accuracy_level", 0) == ROUNDS
    return Kernel(kind=node.op_type, integer=rounds or node.op_type in INTEGER, bits=numbers.get("bits"))


def _find_blocked(blocked: list[tuple[str, Kernel]], view: View, found: Ran) -> None:
    """The nearest layer before the output that a convolution is called after; those that are called after their own come first."""
    values = {str(v.name): v for _, node in view.nodes for v in node.outputs if v is not None and v.name}
    waiting = []
    for name, kernel in blocked:
        called = name[: name.rindex(BLOCKED)]
        called = (
            called if called in values else next((v for v in sorted(values, key=len, reverse=True) if called.endswith(v)), "")
        )
        ways = list(_back(values.get(called)))
        waiting.append((ways[0][0] if ways else 0, [node for _, node in ways], kernel))
    for _, nodes, kernel in sorted(waiting, key=lambda way: way[0]):
        node = next((n for n in nodes if id(n) not in found.by_node), None)
        if node is None:
            found.unknown.append(kernel)
        else:
            found.by_node[id(node)] = [kernel]


def _back(value: ir.Value | None, steps: int = 6) -> Iterator[tuple[int, ir.Node]]:
    """Yield (distance, node) of the convolutions before a value."""
    level = [value]
    for distance in range(steps):
        nodes = [v.producer() for v in level if v is not None]
        yield from ((distance, n) for n in nodes if n is not None and "Conv" in n.op_type)
        level = [v for n in nodes if n is not None and "Conv" not in n.op_type for v in n.inputs]
