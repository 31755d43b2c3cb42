"""Constants of a graph: new ones for the passes that need one, and equal ones made one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

SMALL = 4096  # elements: shapes, scales, biases; comparing more takes longer than it saves


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register `array` as an initializer of `graph` and return its value."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def merge_equal(graph: ir.Graph, keep: frozenset[str]) -> None:
    """Let the users of equal small constants share the first; one named in `keep` stays, since its name says which weight it is."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        constant_value = value.const_value
        if name in keep or constant_value is None or value.is_graph_output() or value.is_graph_input():
            continue
        if constant_value.size > SMALL:
            continue
        key = (constant_value.dtype, tuple(constant_value.shape), constant_value.tobytes())
        same = first.setdefault(key, value)
        if same is not value:
            for user, index in list(value.uses()):
                user.replace_input_with(index, same)
            graph.initializers.pop(name)
