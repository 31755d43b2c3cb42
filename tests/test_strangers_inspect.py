"""`inspect` counts the layers of anyone's file, wherever they stand in it, and tells the kernel and the reason of each truly."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import torchopt

RNG = np.random.default_rng(0)


def model_of(body: str, inputs: str = "float[N, 8] x", output: str = "y", functions: str = "", opset: str = '"": 21', **tensors):
    made = parser.parse_model(f"<ir_version: 10, opset_import: [{opset}]> g ({inputs}) => ({output}) {{ {body} }} {functions}")
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items())
    return made


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def rows(tmp_path, model) -> list[tuple[str, str, bool, str]]:
    onnx.save(model, tmp_path / "m.onnx")
    found = torchopt.inspect(tmp_path / "m.onnx")
    assert found.integer == [layer.name for layer in found.layers if layer.integer]
    return [(layer.name, layer.kernel, layer.integer, layer.reason) for layer in found.layers]


FLOAT = "its weight is float"
BRANCH = """y = If (flag) <then_branch = a () => (p) {p = MatMul (x, w)},
    else_branch = b () => (q) {v = Constant <value = float[8, 1] {1, 2, 3, 4, 5, 6, 7, 8}> () q = MatMul (x, v)}>"""
LOOP = """n = Constant <value_int = 3> () c = Constant <value = bool {1}> ()
    y = Loop (n, c, x) <body = b (int64 i, bool go, float[N, 8] h) => (on, out) {on = Identity (go) out = MatMul (h, w)}>"""
SCAN = """last, y = Scan <num_scan_inputs = 1, body = b (float[8] h, float[8] s) => (next, o) {
    a = MatMul (h, w) next = Add (a, s) o = Identity (next)}> (h0, x)"""
CONSTANT = "k = Constant <value = float[8, 1] {1, 2, 3, 4, 5, 6, 7, 8}> () y = MatMul (x, k)"
CALLS = '<domain: "my", opset_import: ["": 21]> lin (a, b) => (c) {s = MatMul (a, b) c = Relu (s)}'
CASES = {
    "constant nodes": (lambda: model_of(CONSTANT), [("k", "MatMul")]),
    "branches": (lambda: model_of(BRANCH, "float[N, 8] x, bool flag", w=w(8, 1)), [("w", "MatMul"), ("y/else_branch/v", "MatMul")]),
    "loop": (lambda: model_of(LOOP, w=w(8, 8)), [("w", "MatMul")]),
    "scan": (lambda: model_of(SCAN, "float[8] h0, float[T, 8] x", w=w(8, 8)), [("w", "Gemm")]),
    "function": (lambda: model_of("t = my.lin (x, w) y = my.lin (t, v)", functions=CALLS, opset='"": 21, "my": 1', w=w(8, 8), v=w(8, 8)),
                 [("w", "MatMul"), ("v", "MatMul")]),
    "ai.onnx": (lambda: model_of("y = MatMul (x, w)", opset='"ai.onnx": 21', w=w(8, 4)), [("w", "MatMul")]),
    "empty": (lambda: model_of("t = MatMul (x, w) o = Transpose (e) y = Concat <axis = 1> (t, o)", "float[64, 8] x", w=w(8, 4), e=w(0, 64)),
              [("w", "MatMul")]),
    "recurrent": (lambda: model_of("y, h = GRU <hidden_size = 4> (x, a, b)", "float[T, 1, 8] x", a=w(1, 12, 8), b=w(1, 12, 4)),
                  [("a", "GRU"), ("b", "GRU")]),
    "einsum": (lambda: model_of('y = Einsum <equation = "ij,jk->ik"> (x, w)', w=w(8, 4)), [("w", "Einsum")]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layers_are_found_wherever_they_stand(tmp_path, name) -> None:
    build, expected = CASES[name]
    assert rows(tmp_path, build()) == [(layer, kernel, False, FLOAT) for layer, kernel in expected]


def convolutions() -> onnx.ModelProto:
    body = "a = Conv (x, w) b = Relu (a) c = Conv (b, v) d = Clip (c, low, high) e = Conv (d, u) f = Add (e, c) y = Conv (f, t)"
    tensors = {"w": w(16, 3, 3, 3), "v": w(16, 16, 1, 1), "u": w(16, 16, 1, 1), "t": w(8, 16, 1, 1)}
    return model_of(body, "float[1, 3, 8, 8] x", "float[1, 8, 6, 6] y", low=np.float32(0), high=np.float32(6), **tensors)


LEVELS = onnxruntime.GraphOptimizationLevel


@pytest.mark.parametrize("level", [None, LEVELS.ORT_ENABLE_EXTENDED, LEVELS.ORT_ENABLE_ALL])
def test_files_that_the_runtime_has_optimized(tmp_path, level) -> None:
    onnx.save(convolutions(), tmp_path / "c.onnx")
    if level is not None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 4
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        onnxruntime.InferenceSession(str(tmp_path / "c.onnx"), options, providers=["CPUExecutionProvider"])
    found = torchopt.inspect(tmp_path / ("o.onnx" if level is not None else "c.onnx"))
    assert [(layer.kernel, layer.reason) for layer in found.layers] == [("Conv", FLOAT)] * 4
    assert found.kernels["Conv"] == 4
    if level is not LEVELS.ORT_ENABLE_ALL:  # there the weights are in the runtime's blocked layout, under names of its own
        assert [layer.name for layer in found.layers] == ["w", "v", "u", "t"]


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data(tmp_path, one_file) -> None:
    model = model_of("t = MatMul (x, w) y = MatMul (t, v)", "float[N, 64] x", w=w(64, 64), v=w(64, 8))
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location="w.bin" if one_file else None,
    )
    assert [(row.name, row.kernel, row.weight_bytes) for row in torchopt.inspect(tmp_path / "m.onnx").layers] == [
        ("w", "MatMul", 64 * 64 * 4),
        ("v", "MatMul", 64 * 8 * 4),
    ]


def test_weights_that_are_computed(tmp_path) -> None:
    body = """m = ReduceMean <keepdims = 1, axes = [1, 2, 3]> (w) c = Sub (w, m) s = Mul (c, g) a = Conv (x, s)
        p = GlobalAveragePool (a) h = Mul (v, p) y = Conv (a, h)"""
    model = model_of(body, "float[1, 3, 8, 8] x", opset='"": 13', w=w(4, 3, 3, 3), g=w(4, 1, 1, 1), v=w(1, 4, 1, 1))
    assert rows(tmp_path, model) == [
        ("w", "Conv", False, "its weight is computed in float from w, at load"),
        ("y", "Conv", False, "its weight is computed at each inference"),
    ]


def test_what_the_runtime_leaves_out_is_said(tmp_path) -> None:
    reason = "is not in the graph that ONNX Runtime runs: computed at load, the same as another, or needed by no output"
    model = model_of("a = MatMul (x, w) b = MatMul (x, w) y = Add (a, b)", w=w(8, 4))
    assert rows(tmp_path, model) == [("w", "none", False, reason), ("w", "MatMul", False, FLOAT)]
    model = model_of("t = MatMul (v, w) y = MatMul (x, t)", v=w(8, 4), w=w(4, 4))
    assert rows(tmp_path, model) == [
        ("w", "none", False, reason),
        ("v", "MatMul", False, "its weight is computed in float from v, at load"),
    ]


def test_other_types_and_ties(tmp_path) -> None:
    model = model_of("c = Cast <to = 10> (x) t = MatMul (c, w) y = Cast <to = 1> (t)", w=w(8, 4).astype(np.float16))
    assert rows(tmp_path, model)[0][3] == "its weight is float16"
    model = model_of("h = Gather (w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul (h, t)", "int64[N] i", w=w(16, 8))
    assert rows(tmp_path, model)[0][3] == "its weight is float, and that of an embedding, which reads it too"


def nbits(level: int | None, bits: int = 4) -> onnx.ModelProto:
    more = {} if level is None else {"accuracy_level": level}
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", N=8, K=32, bits=bits, block_size=32, **more
    )
    codes, scales = RNG.integers(0, 255, (8, 1, 32 * bits // 8)).astype(np.uint8), np.ones((8, 1), np.float32)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size]) for n, size in (("x", 32), ("y", 8))]
    tensors = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], tensors), opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(("level", "bits"), [(None, 4), (1, 4), (4, 4), (None, 8)])
def test_block_weights_are_integers_only_where_the_input_is_rounded(tmp_path, level, bits) -> None:
    reason = "" if level == 4 else f"its {bits}-bit weights become floats in the kernel (weights only)"
    assert rows(tmp_path, nbits(level, bits)) == [("w", "MatMulNBits", level == 4, reason)]


QUANTIZED = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) k = DequantizeLinear <axis = {axis}> (w, ws)"
ROUND = "r = QuantizeLinear (c, s, z) y = DequantizeLinear (r, s, z)"


def quantized(
    layer: str, ending: str = ROUND, *, kind=np.uint8, shape=(4, 3, 3, 3), weights: str = "int8", axis: int = 0, **more
):
    """A layer between QuantizeLinear and DequantizeLinear, as every tool writes it."""
    scale, zero = np.float32(0.1), np.zeros((), kind)
    made = model_of(
        QUANTIZED.format(axis=axis) + " " + layer + " " + ending,
        "float[1, 3, 8, 8] x",
        s=scale,
        z=zero,
        ws=np.full(shape[axis], 0.1, np.float32),
        **more,
    )
    number = getattr(TensorProto, weights.upper())
    made.graph.initializer.append(helper.make_tensor("w", number, shape, RNG.integers(-7, 7, int(np.prod(shape)))))
    return made


INTEGER = {
    "right": (quantized("c = Conv (d, k)"), True, ""),
    "int4": (quantized("c = Conv (d, k)", weights="int4"), False,
             "its weights have 4 bits in the graph, for which ONNX Runtime has no kernel with rounded inputs"),
    "16 bits": (quantized("c = Conv (d, k)", kind=np.uint16), False,
                "its activations have 16 bits, for which ONNX Runtime has no integer kernel"),
    "bias": (quantized("b = ReduceSum <keepdims = 0> (x) e = Expand (b, four) c = Conv (d, k, e)", four=np.array([4])), False,
             "its bias is float"),
    "output": (quantized("c = Conv (d, k)", "y = Sin (c)"), False, "its output is not quantized"),
    "input": (quantized("c = Conv (x, k)"), False, "its input is not quantized"),
    "transposed": (quantized("c = ConvTranspose (d, k)", shape=(3, 4, 2, 2)), False, "ONNX Runtime has no integer kernel for this form"),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER)
def test_the_reason_is_the_condition_that_fails(tmp_path, name) -> None:
    model, integer, reason = INTEGER[name]
    kernel = "QLinearConv" if integer else "ConvTranspose" if name == "transposed" else "Conv"
    assert rows(tmp_path, model) == [("w", kernel, integer, reason)]


def test_the_condition_that_fails_is_the_only_one(tmp_path) -> None:
    """With an int32 bias, the layer with a bias is an integer one."""
    model = quantized(
        "b = DequantizeLinear <axis = 0> (bias, bs) c = Conv (d, k, b)",
        bias=np.ones(4, np.int32),
        bs=np.full(4, 0.01, np.float32),
    )
    assert rows(tmp_path, model) == [("w", "QLinearConv", True, "")]


def test_own_operators_of_a_packed_file_decode_nothing(tmp_path) -> None:
    """A model may gather and sum for itself; only what packing brought counts."""
    body = "i = Constant <value_int = 1> () s = CumSum (x, i) g = GatherElements <axis = 1> (s, places) y = MatMul (g, w)"
    table = RNG.standard_normal(4).astype(np.float32)[RNG.integers(0, 4, (64, 256))]
    model = model_of(body, "float[2, 64] x, int64[2, 64] places", w=table)
    onnx.save(model, tmp_path / "m.onnx")
    assert torchopt.pack(tmp_path / "m.onnx", tmp_path / "p.onnx").rows[0].name == "w"
    found = torchopt.inspect(tmp_path / "p.onnx")
    assert {"CumSum", "GatherElements"} <= set(found.kernels)
    assert found.undecoded == []
    assert [(layer.name, layer.kernel) for layer in found.layers] == [("w", "MatMul")]


def test_weights_that_are_decoded_at_each_inference_are_said(tmp_path) -> None:
    """A decoder that reads an input of the model cannot be folded."""
    table = RNG.standard_normal(4).astype(np.float32)[RNG.integers(0, 4, (64, 256))]
    onnx.save(model_of("y = MatMul (x, w)", "float[2, 64] x", w=table), tmp_path / "m.onnx")
    torchopt.pack(tmp_path / "m.onnx", tmp_path / "p.onnx")
    model = onnx.load(tmp_path / "p.onnx")
    call = next(node for node in model.graph.node if node.domain == "torchopt")
    given = next(t for t in model.graph.initializer if t.name == call.input[-1])  # the table, which a caller gives from now on
    model.graph.input.append(helper.make_tensor_value_info(given.name, given.data_type, list(given.dims)))
    model.graph.initializer.remove(given)
    onnx.save(model, tmp_path / "p.onnx")
    assert torchopt.inspect(tmp_path / "p.onnx").undecoded != []


def test_files_without_layers_say_so(tmp_path) -> None:
    node = helper.make_node("LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[1.0, 2.0], intercepts=[0.0])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size]) for n, size in (("x", 2), ("y", 1))]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)], ir_version=9), tmp_path / "m.onnx")
    found = torchopt.inspect(tmp_path / "m.onnx")
    assert str(found).splitlines() == [
        "no convolution, matrix product or recurrent layer with weights is in this file",
        "  1 LinearRegressor",
    ]
    assert torchopt.report(tmp_path / "m.onnx").rows == []
    assert torchopt.benchmark(tmp_path / "m.onnx", repeats=1, progress=False).rows[0].inputs["x"]["shape"] == [1, 2]
