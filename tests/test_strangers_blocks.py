"""Weights in blocks as ONNX Runtime's own quantizer writes them: what it multiplies an identity with is what we say they are."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from torchopt.export import decode_initializers, unpack
from torchopt.pack import pack
from torchopt.report import report

K, N, BLOCK = 100, 24, 32  # the last block is filled up


def run(path, feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # else inputs of a product are rounded too
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def quantized(path, bits, symmetric, form=QuantFormat.QOperator):
    w = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, 1, ["b", size]) for name, size in (("x", K), ("y", N)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    logging.disable(logging.CRITICAL)
    try:
        quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=BLOCK, is_symmetric=symmetric, quant_format=form)
        quantizer.process()
    finally:
        logging.disable(logging.NOTSET)
    onnx.save(quantizer.model.model, path)
    return quantizer.model.model


def changed(model, path, name, array):
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("bits", "form"), [(b, f) for b in (4, 8) for f in ("as written", "scales in one row")] + [(4, "float zero points")]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_what_onnx_runtime_multiplies_with(tmp_path, bits, symmetric, form):
    path = tmp_path / "a.onnx"
    model = quantized(path, bits, symmetric)
    scales = numpy_helper.to_array(model.graph.initializer[1])
    if form == "scales in one row":
        changed(model, path, "w_scales", scales.reshape(-1))
    elif form == "float zero points":
        if symmetric:
            model.graph.node[0].input.append("w_zero_points")
            model.graph.initializer.append(numpy_helper.from_array(np.zeros((N, 4), np.float32), "w_zero_points"))
        changed(model, path, "w_zero_points", np.random.default_rng(1).uniform(2, 9, (N, 4)).astype(np.float32))
    w = decode_initializers(path)[f"w_Q{bits}"]
    theirs = run(path, {"x": np.eye(K, dtype=np.float32)}).T
    np.testing.assert_allclose(w, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max() if form == "float zero points" else 0)
    row = next(row for row in report(path).rows if row.name == f"w_Q{bits}")
    assert (row.shape, row.techniques[-1]) == ((N, K), f"int{bits}")
    pack(path, tmp_path / "b.onnx")
    np.testing.assert_array_equal(decode_initializers(tmp_path / "b.onnx")[f"w_Q{bits}"], w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_linear_in_blocks(tmp_path, symmetric):
    path = tmp_path / "a.onnx"
    quantized(path, 4, symmetric, QuantFormat.QDQ)
    w = decode_initializers(path)["w_DQ_Q4"]
    np.testing.assert_array_equal(w, run(path, {"x": np.eye(K, dtype=np.float32)}))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_tables_in_blocks(tmp_path, bits, zeros):
    rng, path = np.random.default_rng(0), tmp_path / "a.onnx"
    rows, width, block = 40, 64, 16
    stored = rng.integers(0, 256, (rows, width * bits // 8)).astype(np.uint8)
    constants = {"q": stored, "s": rng.uniform(0.1, 1, (rows, width // block)).astype(np.float32)}
    if zeros:
        constants["z"] = rng.integers(0, 256, (rows, width // block * bits // 8)).astype(np.uint8)
    inputs = ["q", "i", "s"] + (["z"] if zeros else [])
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain="com.microsoft", bits=bits, block_size=block)
    node.attribute.extend([helper.make_attribute("quantize_axis", 1), helper.make_attribute("gather_axis", 0)])
    i, y = helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]), helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph([node], "g", [i], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    np.testing.assert_array_equal(decode_initializers(path)["q"], run(path, {"i": np.arange(rows)}))


def test_float16_scales_round_as_onnx_runtime_does(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.onnx"
    q, s = rng.integers(-128, 128, (16, 8)).astype(np.int8), rng.uniform(0.1, 1, 16).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["q", "s"], ["d"], axis=0), helper.make_node("Identity", ["d"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(q, "q"), numpy_helper.from_array(s, "s")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    pack(path, tmp_path / "b.onnx")
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    for name in "ac":
        np.testing.assert_array_equal(decode_initializers(tmp_path / f"{name}.onnx")["q"], run(path, {}), strict=True)
