"""Every place of a model that holds a tensor, and a tensor's bytes: what reading and writing have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import onnx_ir as ir

Put = Callable[[ir.TensorProtocol], None]


def places(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Put]]:
    """Yield each tensor of a model, those of subgraphs and functions included, and what puts another one in its place."""
    graphs: list[ir.Graph | ir.Function] = [model.graph]
    for function in model.functions.values():
        graphs.append(function)
        for default in list(function.attributes.values()):
            yield from _of_attribute(function.attributes, default, graphs)
    for graph in graphs:  # it grows
        for value in getattr(graph, "initializers", {}).values():
            if value.const_value is not None:
                yield value.const_value, functools.partial(setattr, value, "const_value")
        for node in graph:
            for attribute in list(node.attributes.values()):
                yield from _of_attribute(node.attributes, attribute, graphs)


def _of_attribute(
    attributes: MutableMapping[str, ir.Attr], attribute: ir.Attr, graphs: list[ir.Graph | ir.Function]
) -> Iterator[tuple[ir.TensorProtocol, Put]]:
    """The tensors of one attribute; its graphs are added to those that are still to be seen."""
    if attribute.is_ref():
        return
    if attribute.type == ir.AttributeType.TENSOR:
        yield attribute.as_tensor(), functools.partial(_put, attributes, attribute, None)
    elif attribute.type == ir.AttributeType.TENSORS:
        for number, tensor in enumerate(attribute.as_tensors()):
            yield tensor, functools.partial(_put, attributes, attribute, number)
    elif attribute.type == ir.AttributeType.GRAPH:
        graphs.append(attribute.as_graph())
    elif attribute.type == ir.AttributeType.GRAPHS:
        graphs.extend(attribute.as_graphs())


def bytes_of(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return the tensor's bytes as they lie in a file, uint8 (n,): a view wherever there is one."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _put(attributes: MutableMapping[str, ir.Attr], old: ir.Attr, number: int | None, tensor: ir.TensorProtocol) -> None:
    value: Any = tensor
    if number is not None:  # of the attribute as it is now: others of its tensors may have been put already
        value = [*attributes[old.name].as_tensors()]
        value[number] = tensor
    attributes[old.name] = ir.Attr(old.name, old.type, value, doc_string=old.doc_string)
