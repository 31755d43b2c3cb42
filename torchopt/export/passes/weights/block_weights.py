"""4-bit weights with a scale a block of inputs, for the 4-bit kernel of ONNX Runtime.

    x · wᵀ [+ b]   as Gemm, or MatMul(Transpose(w)) and Add   →   MatMulNBits(x, two codes a byte, scales, b)

The bytes are (outputs, blocks, block/2), low half first, each code as q + 8: the order of torch's weight, so nothing is transposed.
The operator is ONNX Runtime's own (com.microsoft). Standard ONNX could say the same by a DequantizeLinear with block_size, but ORT
1.32 fuses that only where no ReLU follows (it makes Gemm and Relu one first), and else dequantizes at each inference, 6 times slower.
Activations stay float, as mode="weight_only" says. accuracy_level 4 lets the kernel round x to 8 bits, block by block: at most the latency
of float, where exact arithmetic takes 1.7 times as long, and 0.5 % of the largest output, but all of a block's accuracy where one input
is a thousand times the others. So that is what `export(fast_blocks=True)` asks for. A weight with other readers is left to
`IntegerWeightsPass`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant
from torchopt.export.passes.weights.integer_weights import integers
from torchopt.network.grid import Grid

MICROSOFT = "com.microsoft"
EXACT, FAST = 1, 4  # accuracy_level: float arithmetic; integers
ZERO = 8  # what the kernel subtracts from a code


def rounds_its_input(node: ir.Node) -> bool:
    """True for a product in blocks that ONNX Runtime may compute on integers."""
    level = node.attributes.get("accuracy_level")
    return node.op_type == "MatMulNBits" and level is not None and level.as_int() == FAST


class BlockWeightsPass(ir.passes.InPlacePass):
    """Rewrite every product with a weight that has a scale a block.

    Args:
        grids: the grid of each weight, by initializer name (`torchopt.network.grid.grids(model)`).
        fast: let the kernel round its inputs.
    """

    def __init__(self, grids: Mapping[str, Grid], fast: bool = False) -> None:
        super().__init__()
        self.accuracy = FAST if fast else EXACT
        self.grids = {name: grid for name, grid in grids.items() if grid.block is not None and grid.bits == 4}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite `model` in place."""
        modified = False
        for name, grid in self.grids.items():
            weight = model.graph.initializers.get(name)
            products = _products(weight) if weight is not None else []
            if weight is not None and products:
                _rewrite(model.graph, weight, grid, products, self.accuracy)
                model.opset_imports[MICROSOFT] = 1
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def two_a_byte(codes: np.ndarray, block: int) -> np.ndarray:
    """Return int8 codes −8 … 7 of shape (outputs, inputs) as bytes of shape (outputs, blocks, block/2).

    Example:
        >>> two_a_byte(np.array([[-8, 7, 0, 1]], np.int8), 4).tolist()
        [[[240, 152]]]
    """
    halves = (codes + ZERO).astype(np.uint8).reshape(codes.shape[0], -1, block)
    return np.asarray(halves[..., 0::2] | (halves[..., 1::2] << 4))


def is_plain_gemm(node: ir.Node) -> bool:
    """True for the Gemm of a linear layer: x · wᵀ + b, no factors.

    Example:
        >>> is_plain_gemm(ir.Node("", "Gemm", [None, None], [ir.AttrInt64("transB", 1)]))
        True
    """
    plain: dict[str, object] = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return node.op_type == "Gemm" and plain | given == plain | {"transB": 1}


def _products(weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply with a weight transposed; none where another kind of node reads it too."""
    found: list[ir.Node] = []
    for user, index in weight.uses():
        if user.op_type == "Transpose":
            readers = list(user.outputs[0].uses())
            if not all(reader.op_type == "MatMul" and place == 1 for reader, place in readers):
                return []
            found += [reader for reader, _ in readers]
        elif is_plain_gemm(user) and index == 1:
            found.append(user)
        else:
            return []
    return found


def _rewrite(graph: ir.Graph, weight: ir.Value, grid: Grid, products: list[ir.Node], accuracy: int) -> None:
    assert weight.const_value is not None
    assert grid.block is not None
    codes, scale = integers(weight.const_value.numpy(), grid)
    name = str(weight.name)
    graph.initializers.pop(name)
    weight.name = f"{name}_float"
    operands = [constant(graph, name, two_a_byte(codes, grid.block)), constant(graph, f"{name}_scale", scale)]
    sizes = {"N": codes.shape[0], "K": codes.shape[1], "bits": 4, "block_size": grid.block, "accuracy_level": accuracy}
    for product in products:
        last, bias = _with_bias(product)
        inputs = [product.inputs[0], *operands, *((None, None, bias) if bias is not None else ())]
        node = ir.Node(MICROSOFT, "MatMulNBits", inputs, [ir.AttrInt64(key, size) for key, size in sizes.items()])
        gone = [product] if last is product else [last, product]
        ir.convenience.replace_nodes_and_values(graph, last, gone, [node], last.outputs, node.outputs)


def _with_bias(product: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The node that gives the layer's result, and the bias that it adds."""
    if product.op_type == "Gemm":
        return product, product.inputs[2] if len(product.inputs) == 3 else None
    users = [user for user, _ in product.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not product.outputs[0].is_graph_output():
        bias = next((v for v in users[0].inputs if v is not None and v.is_initializer() and len(v.shape or ()) == 1), None)
        if bias is not None:
            return users[0], bias
    return product, None
