"""Sparse constants of ONNX files (COO: the nonzeros and their int64 places), written as dense ones, which packing makes small again.

ONNX Runtime does the same when it loads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import numpy_helper

AT_MOST, TIMES = 1 << 20, 1000  # bytes, or that many times the sparse form's: a small file never claims a huge tensor


def check_names(graph: onnx.GraphProto) -> None:
    """Refuse two tensors of one name, of which ONNX Runtime takes the first, onnx the last, and each tool its own.

    Raises:
        ValueError: a graph, or a subgraph, has them.
    """
    names = [tensor.name for tensor in graph.initializer] + [sparse.values.name for sparse in graph.sparse_initializer]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"two of its tensors are called {twice!r}, and which of them is read differs from tool to tool")
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            check_names(inner)


def densify(graph: onnx.GraphProto) -> None:
    """Make the sparse initializers and Constants of a graph and of its subgraphs dense, in place.

    Raises:
        ValueError: one is damaged, or claims far more than it holds.
    """
    graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
    graph.ClearField("sparse_initializer")
    densify_nodes(graph.node)


def densify_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    """Do the same to the Constants among nodes, and within their subgraphs."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                dense = _dense(attribute.sparse_tensor)
                attribute.Clear()
                attribute.MergeFrom(onnx.helper.make_attribute("value", dense))
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                densify(inner)


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """The values at their places, which are given as one number or as one a dimension.

    Example:
        >>> values = numpy_helper.from_array(np.float32([7]), "w")
        >>> places = numpy_helper.from_array(np.int64([[1, 0]]))
        >>> numpy_helper.to_array(_dense(onnx.SparseTensorProto(values=values, indices=places, dims=[2, 2]))).tolist()
        [[0.0, 0.0], [7.0, 0.0]]
    """
    shape, name = tuple(sparse.dims), sparse.values.name
    if onnx.TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        raise ValueError(f"the data of sparse tensor {name!r} lie in another file, which ONNX has not")
    values, at = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * values.itemsize > max(AT_MOST, TIMES * sparse.ByteSize()):
        raise ValueError(f"sparse tensor {name!r} of {sparse.ByteSize()} bytes claims to have the shape {shape}")
    if at.ndim == 2:
        if at.shape[1] != len(shape) or (at < 0).any() or (at >= shape).any():
            raise ValueError(f"a place of sparse tensor {name!r} lies outside its shape {shape}")
        at = at @ np.append(np.cumprod(shape[:0:-1])[::-1], 1).astype(np.int64)
    if at.shape != values.shape or (at < 0).any() or (at >= count).any():
        raise ValueError(f"a place of sparse tensor {name!r} lies outside its shape {shape}")
    dense = np.zeros(count, values.dtype)
    dense[at] = values
    return numpy_helper.from_array(dense.reshape(shape), name)
