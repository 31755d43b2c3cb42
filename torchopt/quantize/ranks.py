"""How many dimensions a value has is known before the network runs: questions about it are answered, and no reader of the value.

    assert y.ndim == 4        a batch norm of anyone's own asks so before it normalizes; with a reader beside the batch norm, no
                              convolution would take the batch norm in

What becomes constant so is computed, and assertions that hold are dropped. Sizes stay questions: another batch may have others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

RANK_METHODS = {"dim", "ndimension"}
COMPUTED = {
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.add, operator.sub, operator.mul,
    operator.neg, operator.not_, operator.contains, operator.and_, operator.or_,
}  # fmt: skip


def answer_ranks(graph: fx.Graph, value: Any) -> None:
    """Replace what depends on numbers of dimensions alone by its value, in place; `value` gives the example of a node."""
    for node in list(graph.nodes):
        if _asks_rank(node):
            dims = getattr(value(node.args[0]), "ndim", None)
        elif node.op == "call_function" and node.target in COMPUTED and not node.all_input_nodes:
            dims = node.target(*node.args, **node.kwargs)
        else:
            if node.target is torch._assert and not node.all_input_nodes and node.args[0]:
                graph.erase_node(node)
            continue
        if isinstance(dims, int):
            _put(graph, node, dims)


def _asks_rank(node: fx.Node) -> bool:
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    attribute = node.op == "call_function" and node.target is getattr and node.args[1:] == ("ndim",)
    return bool(attribute) or (node.op == "call_method" and node.target in RANK_METHODS)


def _put(graph: fx.Graph, node: fx.Node, constant: int) -> None:
    """Write a number where a node was read."""
    for user in list(node.users):
        swap = lambda n: constant if n is node else n  # noqa: E731
        user.args, user.kwargs = fx.node.map_arg(user.args, swap), fx.node.map_arg(user.kwargs, swap)
    graph.erase_node(node)
