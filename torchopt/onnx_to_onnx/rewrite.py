"""Weights of a stranger's graph put into another form, wherever they stand.

A weight is a constant of float32 that a layer multiplies with (`View.layers`) or that rows are taken from (an embedding), large enough
that a form pays. It keeps its name: nodes that give the float tensor from its codes stand in its place, at the front of its graph.

    codes → Cast → (Reshape) → Mul scale → (Reshape) → the weight's name
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from torchopt.onnx_file.view import Constant, View
from torchopt.onnx_to_onnx.forms import Form, rounded

SMALLEST = 1024  # elements; below, the nodes that decode take what the codes save
TAKES_ROWS = {"Gather"}


def rewrite(model: ir.Model, kind: str, clusters: int = 0) -> dict[str, Form]:
    """Put every weight of `model` into a form, in place.

    Args:
        model: as `read` gives it.
        kind: as in `rounded`.
        clusters: of "shared".

    Returns:
        The forms, by the weight's name (with its scope, where that is not the main graph).
    """
    done = {}
    for constant in list(weights(View(model))):
        assert constant.tensor is not None
        form = rounded(constant.tensor.numpy(), kind, clusters)
        if form is not None:
            _replace(constant, form)
            done[f"{constant.scope.name}/{constant.name}".lstrip("/")] = form
    return done


def weights(view: View) -> Iterator[Constant]:
    """Yield the constants that may be rounded, each once."""
    layers = {id(weight.value): weight for layer in view.layers for weight in layer.weights}
    for constant in view.constants:
        rows = any(node.op_type in TAKES_ROWS and index == 0 for node, index in constant.readers)
        if (id(constant.value) in layers or rows) and _roundable(constant):
            yield constant


def _roundable(constant: Constant) -> bool:
    tensor = constant.tensor
    if (
        tensor is None
        or constant.replaceable
        or constant.value.is_graph_output()
        or not isinstance(constant.scope.body, ir.Graph)
    ):
        return False
    if tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST or len(tensor.shape) < 2:
        return False
    values = tensor.numpy()
    return bool(np.isfinite(values).all()) and bool(values.any())


def _replace(constant: Constant, form: Form) -> None:
    graph, value = constant.scope.body, constant.value
    assert isinstance(graph, ir.Graph)
    users, name, producer = list(value.uses()), str(value.name), value.producer()
    if producer is None:
        graph.initializers.pop(name)
        value.name = None
    else:
        value.name = None
        for user, index in users:
            user.replace_input_with(index, None)
        graph.remove(producer, safe=True)
    if form.kind == "shared":
        output = _initializer(graph, name, form.codes)
    else:
        nodes = list(_decoding(graph, name, form))
        output = nodes[-1].outputs[0]
        output.name = name
        output.shape, output.type = ir.Shape(form.value.shape), ir.TensorType(ir.DataType.FLOAT)
        first = next(iter(graph), None)
        if first is None:
            graph.extend(nodes)
        else:
            graph.insert_before(first, nodes)
    for user, index in users:
        user.replace_input_with(index, output)


def _decoding(graph: ir.Graph, name: str, form: Form) -> Iterator[ir.Node]:
    """The nodes that give the weight; the last one's output is to get its name."""
    cast = _cast(_initializer(graph, f"{name}_codes", form.codes), f"{name}_numbers")
    yield cast
    if form.scale is None:
        return
    scale = _initializer(graph, f"{name}_scale", form.scale)
    if form.scale.dtype == np.float16:
        wide = _cast(scale, f"{name}_scales")
        yield wide
        scale = wide.outputs[0]
    product = ir.Node("", "Mul", [cast.outputs[0], scale])
    product.outputs[0].name = f"{name}_product"  # unique: branches are graphs of their own, and names are not
    yield product
    if form.codes.shape != form.value.shape:
        shape = _initializer(graph, f"{name}_shape", np.array(form.value.shape, np.int64))
        yield ir.Node("", "Reshape", [product.outputs[0], shape])


def _cast(value: ir.Value, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
    node.outputs[0].name = name
    return node


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    taken = graph.initializers
    while name in taken:
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
