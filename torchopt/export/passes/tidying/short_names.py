"""The fixed cost of a file: names, recorded shapes and duplicates, which count in bytes for a network of 20,000 weights.

1. Two initializers with equal bytes, type and shape (scales, zero points)     → one; a weight named in `keep` is never dropped
2. Values between nodes, and constants that are not in `keep`                    → names of one to three characters
3. Names of nodes, recorded types and shapes of values between nodes            → gone (every runtime infers them)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product

import onnx_ir as ir

from torchopt.export.passes.constants import merge_equal

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ShortNamesPass(ir.passes.InPlacePass):
    """Cases 1 to 3 of the module's docstring.

    Args:
        keep: initializers that keep their names.
    """

    def __init__(self, keep: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.keep = keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Shorten the names of `model`; it is a no-op on graphs with subgraphs, whose names have scopes."""
        graph = model.graph
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for n in graph for a in n.attributes.values()):
            return ir.passes.PassResult(model, modified=False)
        merge_equal(graph, self.keep)
        fixed = {v.name for v in (*graph.inputs, *graph.outputs)} | self.keep
        names = (name for name in _short() if name not in fixed)
        renamed = [v for name, v in list(graph.initializers.items()) if name not in fixed]
        for value in renamed:
            graph.initializers.pop(str(value.name))
        for value in renamed:
            value.name = next(names)
            assert value.const_value is not None
            value.const_value.name = value.name
            graph.register_initializer(value)
        for node in graph:
            node.name = None
            for value in node.outputs:
                if value.name not in fixed and value.name:
                    value.name, value.shape, value.type = next(names), None, None
        return ir.passes.PassResult(model, modified=True)


def _short() -> Iterator[str]:
    """Yield a, b, … Z, aa, ab, …"""
    for length in count(1):
        yield from map("".join, product(LETTERS, repeat=length))
