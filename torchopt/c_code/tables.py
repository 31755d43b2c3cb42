"""Functions of one 8-bit value, whatever the graph writes them with, as tables of 256: ONNX Runtime itself computes the entries.

DequantizeLinear → HardSwish → QuantizeLinear, a sigmoid's integer kernel, a gate x·σ(x) in the open: each entry of the result depends
on one entry of one 8-bit tensor, so 256 bytes hold all that can come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from torchopt.c_code.finished import Finished

ELEMENTWISE = {
    "Abs", "Add", "Ceil", "Celu", "Clip", "DequantizeLinear", "Div", "Elu", "Erf", "Exp", "FastGelu", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "QLinearAdd", "QLinearLeakyRelu", "QLinearMul",
    "QLinearSigmoid", "QuantizeLinear", "QuickGelu", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt",
    "Sub", "Tanh", "ThresholdedRelu",
}  # fmt: skip
SMALL = (np.uint8, np.int8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """`values[byte]` is what the value `name` holds where `source` holds that byte."""

    name: str
    source: str
    values: np.ndarray


def tables(found: Finished) -> dict[str, Table]:
    """Return a table for each 8-bit value that is a function of another one, entry by entry."""
    behind: dict[str, str] = {}  # float value → the 8-bit one that it is a function of
    regions: dict[str, list[onnx.NodeProto]] = {}
    made = {}
    for node in found.graph.node:
        given = [name for name in node.input if name and name not in found.constants]
        sources = {behind.get(name, name) for name in given}
        name = node.output[0]
        if node.op_type not in ELEMENTWISE or len(sources) != 1 or len(node.output) != 1:
            continue
        source = sources.pop()
        fixed = [found.constants[i] for i in node.input if i in found.constants]
        if not _small(found, source) or any(c.size != 1 for c in fixed) or found.values[name].shape != found.values[source].shape:
            continue
        region = [n for i in given for n in regions.get(i, [])]
        region = [n for k, n in enumerate(region) if all(n is not m for m in region[:k])] + [node]
        if _small(found, name):
            made[name] = Table(name=name, source=source, values=_computed(found, source, name, region))
        else:
            behind[name], regions[name] = source, region
    return made


def _small(found: Finished, name: str) -> bool:
    return found.values[name].dtype in SMALL


def _computed(found: Finished, source: str, name: str, nodes: list[onnx.NodeProto]) -> np.ndarray:
    kind, out = found.values[source].dtype, found.values[name].dtype
    used = {i for node in nodes for i in node.input}
    type_of = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [n for n in found.graph.node if any(n is m for m in nodes)],
        "table",
        [onnx.helper.make_tensor_value_info(source, type_of(kind), [256])],
        [onnx.helper.make_tensor_value_info(name, type_of(out), [256])],
        [onnx.numpy_helper.from_array(value, key) for key, value in found.constants.items() if key in used],
    )
    model = onnx.helper.make_model(graph, opset_imports=found.opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {source: np.arange(256).astype(np.uint8).view(kind)})[0])
