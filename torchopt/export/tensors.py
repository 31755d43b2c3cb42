"""Every place of a model that holds a tensor, and a tensor's bytes: what reading and writing have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

Put = Callable[[ir.TensorProtocol], None]


def places(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Put]]:
    """Yield each tensor of a model, those of subgraphs and functions included, and what puts another one in its place."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for value in getattr(graph, "initializers", {}).values():
            if value.const_value is not None:
                yield value.const_value, functools.partial(setattr, value, "const_value")
        for node in graph:
            for attribute in list(node.attributes.values()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor(), functools.partial(_put, node, attribute)
                elif attribute.type == ir.AttributeType.GRAPH:
                    graphs.append(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    graphs.extend(attribute.as_graphs())


def bytes_of(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return the tensor's bytes as they lie in a file, uint8 (n,): a view wherever there is one."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _put(node: ir.Node, old: ir.Attr, tensor: ir.TensorProtocol) -> None:
    node.attributes[old.name] = ir.Attr(old.name, ir.AttributeType.TENSOR, tensor, doc_string=old.doc_string)
