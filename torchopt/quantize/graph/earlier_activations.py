"""Activations behind what only moves values, put before it, where the layer that made the values absorbs them.

    relu(move(x)) = move(relu(x))        slices, reshapes, pads with zeros, max pools, nearest pixels

for any activation that is monotone and keeps 0.

A causal convolution is followed by a slice that cuts off the end, and only then by its ReLU. On the grid of the convolution's own result
half of the integers would be for negative values that nobody reads, and the value would be rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

Says = Callable[[fx.Node], bool]


def lift(traced: fx.GraphModule, is_activation: Says, is_move: Says, is_layer: Says) -> None:
    """Move every activation that follows moves directly behind the layer before them, in place.

    Args:
        traced: the graph.
        is_activation: says that a node is a ReLU-like activation of one tensor.
        is_move: says that a node only moves the values of one tensor.
        is_layer: says that a node is a layer that absorbs an activation.
    """
    for node in list(traced.graph.nodes):
        if not is_activation(node):
            continue
        first = node.all_input_nodes[0]
        top = first
        while is_move(top) and len(top.users) == 1:
            reader, top = top, top.all_input_nodes[0]
        if top is first or not is_layer(top) or len(top.users) > 1:
            continue
        node.replace_all_uses_with(first)
        node.replace_input_with(first, top)
        reader.replace_input_with(top, node)
        top.append(node)
    traced.graph.lint()
