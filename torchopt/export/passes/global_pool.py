"""Global average pooling under its own name: ORT has an integer kernel for GlobalAveragePool, and none for ReduceMean.

1. ReduceMean over every spatial axis, dimensions kept        → GlobalAveragePool
2. the same, dimensions dropped, then QuantizeLinear          → GlobalAveragePool → QuantizeLinear → Flatten (of integers)
3. the same, dimensions dropped, then anything else           → GlobalAveragePool → Flatten
"""

from __future__ import annotations

import onnx_ir as ir


class GlobalPoolPass(ir.passes.InPlacePass):
    """Cases 1 to 3 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every global ReduceMean of `model`."""
        nodes = [node for node in model.graph if node.op_type == "ReduceMean" and _is_global(node)]
        for node in nodes:
            _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _is_global(node: ir.Node) -> bool:
    x, shape = node.inputs[0], node.inputs[0].shape if node.inputs[0] is not None else None
    if x is None or shape is None or len(shape) < 3:
        return False
    rank = len(shape)
    axes = _axes(node)
    return axes is not None and sorted(a % rank for a in axes) == list(range(2, rank))


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    if len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    return [int(a) for a in node.inputs[1].const_value.numpy().reshape(-1)]


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None
    assert x.shape is not None
    pool = ir.Node("", "GlobalAveragePool", [x])
    pooled = pool.outputs[0]
    pooled.name, pooled.type = f"{old.name}_pooled", old.type
    pooled.shape = ir.Shape([*x.shape[:2], *[1] * (len(x.shape) - 2)])
    graph.insert_after(node, pool)
    keepdims = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    users = list(old.uses())
    if keepdims:
        _redirect(graph, old, pooled)
    elif len(users) == 1 and users[0][0].op_type == "QuantizeLinear" and not old.is_graph_output():
        quantize = users[0][0]
        quantize.replace_input_with(0, pooled)
        codes = quantize.outputs[0]
        flat_shape, codes.shape = codes.shape, pooled.shape
        flat = _flatten(graph, quantize, codes, flat_shape)
        for user, index in list(codes.uses()):
            if user is not flat.producer():
                user.replace_input_with(index, flat)
    else:
        _redirect(graph, old, _flatten(graph, pool, pooled, old.shape))
    graph.remove(node, safe=True)


def _flatten(graph: ir.Graph, after: ir.Node, value: ir.Value, shape: ir.Shape | None) -> ir.Value:
    node = ir.Node("", "Flatten", [value], [ir.AttrInt64("axis", 1)])
    flat = node.outputs[0]
    flat.name, flat.type, flat.shape = f"{value.name}_flat", value.type, shape
    graph.insert_after(after, node)
    return flat


def _redirect(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    for i, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[i] = new
            new.name, old.name = old.name, f"{old.name}_old"
