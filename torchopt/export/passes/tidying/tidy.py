"""Tidying: what an exporter leaves behind and no runtime needs, without touching a weight.

1. Constant nodes become initializers.
2. Small constants (shapes, axes, zero biases) are computed now; a weight is never an operand of that.
3. Identity nodes, repeated computations, repeated constants and nodes that nothing reads go; equal weights keep their two names.
4. Doc strings and metadata go.
5. Zeros added by a convolution that has no bias go: the exporter writes them, and in three dimensions with a wrong shape.
"""

from __future__ import annotations

import logging

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants

from torchopt.export.passes.constants import SMALL, merge_equal


class TidyPass(ir.passes.InPlacePass):
    """Cases 1 to 5 of the module's docstring.

    Args:
        keep: initializers that must stay as they are, under their names: the model's weights.
    """

    def __init__(self, keep: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.keep = keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Tidy `model` in place."""
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _drop_identities(model)
        log = logging.getLogger("onnxscript")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            fold_constants(model, should_fold=self._may_fold, output_size_limit=SMALL)
        finally:
            log.setLevel(level)
        for step in (
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
        ):
            step(model)
        _drop_identities(model)
        self._drop_zero_biases(model.graph)
        merge_equal(model.graph, self.keep)
        return ir.passes.PassResult(model, modified=True)

    def _drop_zero_biases(self, graph: ir.Graph) -> None:
        for node in graph:
            bias = node.inputs[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 else None
            if (
                bias is not None
                and bias.const_value is not None
                and bias.name not in self.keep
                and not bias.const_value.numpy().any()
            ):
                node.resize_inputs(2)
                if not bias.uses():
                    graph.initializers.pop(str(bias.name))

    def _may_fold(self, node: ir.Node) -> bool | None:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return False
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16:
            return False  # stored so to save bytes
        return False if any(value is not None and value.name in self.keep for value in node.inputs) else None


def _drop_identities(model: ir.Model) -> None:
    """Remove Identity nodes, except one that hands a value of an outer graph, an input or a constant on as a graph's output."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "Identity" or node.domain or node.inputs[0] is None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if result.is_graph_output():
            made = source.producer()
            if made is None or made.graph is not node.graph or source.is_graph_output():
                continue
            source.name = result.name
        ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
