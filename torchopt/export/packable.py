"""Which tensors of a graph packing may put in another form: constants that only nodes of the main graph read."""

from __future__ import annotations

import onnx_ir as ir

from torchopt.export.decoders import DOMAIN
from torchopt.export.pack_report import LeftDense

TYPES = {
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE),  # for bfloat16, ORT has no Expand
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32),
}
SMALLEST = 256  # bytes of a tensor below which no encoding pays


def packable(model: ir.Model) -> tuple[dict[str, ir.Value], list[LeftDense]]:
    """Return (the initializers that may be packed, by name; the others, with the reason).

    Large Constant nodes of the main graph become initializers on the way. What packing made before is in neither.
    """
    graph = model.graph
    _lift(graph)
    inputs, outputs = {id(v) for v in graph.inputs}, {id(v) for v in graph.outputs}
    found: dict[str, ir.Value] = {}
    left = [LeftDense(name=name, dense_bytes=size, reason="inside a subgraph or a function") for name, size in _elsewhere(model)]
    for name, value in graph.initializers.items():
        tensor, users = value.const_value, [user for user, _ in value.uses()]
        if tensor is None or tensor.nbytes <= SMALLEST or any(user.domain == DOMAIN for user in users):
            continue
        reason = None
        if id(value) in inputs:
            reason = "inputs of the model too, which a caller may replace"
        elif id(value) in outputs:
            reason = "outputs of the model too"
        elif tensor.dtype not in TYPES:
            reason = f"of type {tensor.dtype.name.lower()}"
        elif not users:
            reason = "read by no node"
        if reason is None:
            found[str(name)] = value
        else:
            left.append(LeftDense(name=str(name), dense_bytes=tensor.nbytes, reason=reason))
    return found, left


def _lift(graph: ir.Graph) -> None:
    """Make the large Constant nodes initializers, as older exporters write weights."""
    outputs = {id(v) for v in graph.outputs}
    for node in [n for n in graph if n.op_type == "Constant" and n.domain == "" and "value" in n.attributes]:
        output, tensor = node.outputs[0], node.attributes["value"].as_tensor()
        if tensor.nbytes <= SMALLEST or id(output) in outputs:
            continue
        name, output.name = output.name, None
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype))
        for user, index in list(output.uses()):
            user.replace_input_with(index, value)
        graph.remove(node, safe=True)
        graph.register_initializer(value)


def _elsewhere(model: ir.Model) -> list[tuple[str, int]]:
    """Names and bytes of the large constants of subgraphs and of the model's own functions."""
    functions = [function for function in model.functions.values() if function.domain != DOMAIN]
    roots: list[ir.Graph | ir.Function] = [model.graph, *functions]
    nodes = {id(node): node for root in roots for node in ir.traversal.RecursiveGraphIterator(root)}.values()
    graphs = {id(n.graph): n.graph for n in nodes if isinstance(n.graph, ir.Graph) and n.graph is not model.graph}
    found = [(n, v.const_value) for graph in graphs.values() for n, v in graph.initializers.items()]
    constants = [n for n in nodes if n.op_type == "Constant" and "value" in n.attributes]
    found += [(str(n.outputs[0].name), n.attributes["value"].as_tensor()) for n in constants]
    return [(str(name), tensor.nbytes) for name, tensor in found if tensor is not None and tensor.nbytes > SMALLEST]
