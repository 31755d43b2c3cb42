"""How many dimensions a value has, and the shape of a parameter, are known before the network runs: who asks reads no value.

    assert y.ndim == 4        a batch norm of anyone's own asks so before it normalizes; with a reader beside the batch norm, no
                              convolution would take the batch norm in
    weight.shape[-2:]         a convolution that pads by its kernel asks so; a weight that others read is not folded

What becomes constant so is computed, and assertions that hold are dropped. Sizes stay questions: another batch may have others.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

RANK_METHODS = {"dim", "ndimension"}
SIZE_METHODS = {"size"}
COMPUTED = {
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.add, operator.sub, operator.mul,
    operator.neg, operator.not_, operator.contains, operator.and_, operator.or_, operator.getitem, operator.truediv,
    operator.floordiv, operator.mod, math.ceil, math.floor,
}  # fmt: skip


def answer_ranks(graph: fx.Graph, value: Any) -> None:
    """Replace what depends on ranks and on shapes of parameters alone by its value, in place; `value` gives the example of a node."""
    for node in list(graph.nodes):
        known: Any
        if _asks(node, "ndim", RANK_METHODS):
            known = getattr(value(node.args[0]), "ndim", None)
        elif _asks(node, "shape", SIZE_METHODS) and node.args[0].op == "get_attr":
            known = value(node)
        elif node.op == "call_function" and node.target in COMPUTED and not node.all_input_nodes:
            known = node.target(*node.args, **node.kwargs)
        else:
            if node.target is torch._assert and not node.all_input_nodes and node.args[0]:
                graph.erase_node(node)
            continue
        if isinstance(known, tuple) and all(isinstance(size, int) for size in known):
            _put(graph, node, tuple(known))
        elif isinstance(known, int | float):
            _put(graph, node, known)


def _asks(node: fx.Node, attribute: str, methods: set[str]) -> bool:
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if node.op == "call_function" and node.target is getattr:
        return bool(node.args[1:] == (attribute,))
    return node.op == "call_method" and node.target in methods


def _put(graph: fx.Graph, node: fx.Node, constant: Any) -> None:
    """Write a number, or sizes, where a node was read."""
    for user in list(node.users):
        swap = lambda n: constant if n is node else n  # noqa: E731
        user.args, user.kwargs = fx.node.map_arg(user.args, swap), fx.node.map_arg(user.kwargs, swap)
    graph.erase_node(node)
