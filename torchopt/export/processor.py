"""Whether this machine computes the integers that a target's kernels give."""

from __future__ import annotations

import functools
import platform

import numpy as np
import onnx.helper as oh
import onnxruntime
from onnx import TensorProto, numpy_helper

X86 = ("x86_64", "amd64")  # what the kernels that `quantize.kernels` follows run on


def runs_exactly(target: str) -> bool:
    """True where this machine computes the same integers as the target does."""
    return platform.machine().lower() in X86 and (target == "ort-x86-avx2" or (target == "ort-x86" and multiplies_exactly()))


@functools.cache
def multiplies_exactly() -> bool:
    """True where ONNX Runtime sums products of 8-bit integers exactly here: without VNNI, two of them may saturate 16 bits."""
    weight = np.full((64, 16), 127, np.int8)
    product = oh.make_node("MatMulInteger", ["x", "w"], ["y"])
    ends = [
        oh.make_tensor_value_info("x", TensorProto.UINT8, [1, 64]),
        oh.make_tensor_value_info("y", TensorProto.INT32, [1, 16]),
    ]
    graph = oh.make_graph([product], "products", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    opened = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = opened.run(None, {"x": np.full((1, 64), 255, np.uint8)})[0]
    return bool((found == 64 * 255 * 127).all())
