"""Each pass on a graph of a few lines: what it rewrites, what it leaves alone, and that the numbers stay."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper, parser

from torchopt.errors import ModelError
from torchopt.export.passes import (
    DefaultAttributesPass,
    DynamicMatMulPass,
    GlobalPoolPass,
    HalfWeightsPass,
    HardSigmoidPass,
    IntegerWeightsPass,
    KeepFloatPass,
    LateDequantizePass,
    RedundantActivationsPass,
    ShortNamesPass,
    StaticShapesPass,
    TidyPass,
    WideChannelsPass,
)
from torchopt.network.grid import Grid
from torchopt.pack.decoded import weight_values

U8 = np.uint8
GRID = {"s": np.float32(0.047), "z": U8(93), "t": np.float32(0.02), "o": U8(0)}


def model(text: str, **constants) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def session(graph: ir.Model, optimized=None) -> onnxruntime.InferenceSession:
    data = ir.to_proto(graph).SerializeToString()
    onnx.checker.check_model(data)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(graph: ir.Model, x: np.ndarray) -> np.ndarray:
    return session(graph).run(None, {"x": x})[0]


def kinds(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


def optimized_kinds(graph: ir.Model, folder) -> Counter:
    session(graph, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def changes(step, graph: ir.Model) -> bool:
    return bool(step(graph).modified)


# ---------------------------------------------------------------- redundant activations
@pytest.mark.parametrize(
    ("activation", "scale", "zero_point", "stays"),
    [
        ("Relu(x)", 0.1, 0, False),
        ("Relu(x)", 0.1, 1, True),  # the quantizer represents −0.1: the Relu is needed
        ("Clip(x, lo, hi)", 6 / 255, 0, False),
        ("Clip(x, lo, hi)", 5 / 255, 0, False),
        ("Clip(x, lo, hi)", 7 / 255, 0, True),  # the quantizer goes up to 7
    ],
)
def test_activation_before_a_quantizer_goes_where_it_repeats(activation, scale, zero_point, stays) -> None:
    text = f"g(float[N] x) => (uint8[N] y) {{ a = {activation} y = QuantizeLinear(a, s, z) }}"
    constants = {"s": np.float32(scale), "z": U8(zero_point), "lo": np.float32(0), "hi": np.float32(6)}
    before, after = model(text, **constants), model(text, **constants)
    assert changes(RedundantActivationsPass(), after) is not stays
    assert (kinds(after)[0] == "QuantizeLinear") is not stays
    x = np.linspace(-9, 9, 20_001, dtype=np.float32)
    np.testing.assert_array_equal(run(after, x), run(before, x))


@pytest.mark.parametrize(("activation", "ends"), [("Relu(c)", (93, 255)), ("Clip(c, lo, hi)", (66, 119))])
def test_activation_behind_integers_clips_the_integers(activation, ends, tmp_path) -> None:
    """Where the quantizer reaches further: the convolution is one integer kernel, and −0.54 and 0.52 are the integers 66 and 119."""
    text = f"g(uint8[1,2,4,4] x) => (float[1,3,4,4] y) {{ d = DequantizeLinear(x, s, z) u = DequantizeLinear(w, t) c = Conv(d, u) a = {activation} q = QuantizeLinear(a, t, z) y = DequantizeLinear(q, t, z) }}"  # noqa: E501
    w = np.random.default_rng(0).integers(-127, 128, (3, 2, 1, 1), dtype=np.int8)
    constants = {**GRID, "w": w, "lo": np.float32(-0.54), "hi": np.float32(0.52)}
    before, after = model(text, **constants), model(text, **constants)
    assert changes(RedundantActivationsPass(), after)
    assert kinds(after) == ["DequantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear", "Clip", "DequantizeLinear"]
    assert optimized_kinds(after, tmp_path)["QLinearConv"] == 1
    x = np.random.default_rng(1).integers(0, 256, (1, 2, 4, 4), dtype=U8)
    codes = np.rint(run(after, x) / constants["t"]) + 93
    assert (codes.min(), codes.max()) == ends
    assert np.abs(codes - np.rint(run(before, x) / constants["t"]) - 93).max() <= 1  # the integer kernel's own rounding
    assert not changes(RedundantActivationsPass(), model(text.replace("q = Q", "v = Neg(a) q = Q"), **constants))


def test_activation_that_others_read_stays() -> None:
    text = "g(float[N] x) => (uint8[N] y, float[N] w) { a = Relu(x) y = QuantizeLinear(a, s, z) w = Neg(a) }"
    graph = model(text, s=np.float32(0.1), z=U8(0))
    assert not changes(RedundantActivationsPass(), graph)


# ---------------------------------------------------------------- hard sigmoid
HARD = "g(uint8[N] x) => (uint8[N] y) { d = DequantizeLinear(x, s, z) e = HardSigmoid<alpha=0.16666667, beta=0.5>(d) y = QuantizeLinear(e, t, o) }"  # noqa: E501


def test_hard_sigmoid_becomes_one_integer_addition(tmp_path) -> None:
    constants = {**GRID, "t": np.float32(1 / 255)}
    before, after = model(HARD, **constants), model(HARD, **constants)
    assert changes(HardSigmoidPass(), after)
    TidyPass()(after)
    assert optimized_kinds(before, tmp_path) == {"DequantizeLinear": 1, "HardSigmoid": 1, "QuantizeLinear": 1}
    assert optimized_kinds(after, tmp_path) == {"QLinearAdd": 1}
    codes = np.arange(256, dtype=U8)
    apart = np.abs(run(after, codes).astype(int) - run(before, codes))
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= 3  # ties


def test_hard_sigmoid_stays_where_the_quantizer_does_not_clip() -> None:
    graph = model(HARD, **{**GRID, "t": np.float32(2 / 255)})
    assert not changes(HardSigmoidPass(), graph)
    assert "HardSigmoid" in kinds(graph)


# ---------------------------------------------------------------- moves on integers
def test_dequantize_goes_behind_a_reshape(tmp_path) -> None:
    text = (
        "g(uint8[N, 4, 2, 2] x) => (float[N, 3] y) { p = MaxPool<kernel_shape=[1, 1]>(x) d = DequantizeLinear(p, s, z)"
        " f = Flatten(d) k = DequantizeLinear<axis=0>(w, ws, wz) y = Gemm<transB=1>(f, k) }"
    )
    codes = np.arange(48, dtype=np.int8).reshape(3, 16)
    constants = {**GRID, "w": codes, "ws": np.full(3, 0.01, np.float32), "wz": np.zeros(3, np.int8)}
    before, after = model(text, **constants), model(text, **constants)
    assert changes(LateDequantizePass(), after)
    TidyPass()(after)
    assert kinds(after).index("Flatten") < kinds(after).index("DequantizeLinear")
    assert optimized_kinds(after, tmp_path)["QGemm"] == 1
    x = np.random.default_rng(1).integers(0, 256, (2, 4, 2, 2)).astype(U8)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-6)


@pytest.mark.parametrize(
    ("pad", "moves"),
    [
        ('Pad<mode="reflect">(d, p)', True),
        ('Pad<mode="wrap">(d, p)', True),
        ("Pad(d, p)", True),
        ("Pad(d, p, zero)", True),
        ("Pad(d, p, one)", False),  # 1.0 need not be on the grid
    ],
)
def test_dequantize_goes_behind_a_pad_that_adds_what_is_on_the_grid(pad, moves) -> None:
    text = f"g(uint8[1,1,4,4] x) => (float[1,1,6,6] y) {{ i = Identity(x) d = DequantizeLinear(i, s, z) e = {pad} y = Neg(e) }}"
    constants = {**GRID, "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "zero": np.float32(0), "one": np.float32(1)}
    before, after = model(text, **constants), model(text, **constants)
    assert changes(LateDequantizePass(), after) is moves
    TidyPass()(after)
    assert (kinds(after).index("Pad") < kinds(after).index("DequantizeLinear")) is moves
    x = np.random.default_rng(0).integers(0, 256, (1, 1, 4, 4), dtype=U8)
    np.testing.assert_array_equal(run(after, x), run(before, x))


def test_dequantize_of_a_weight_stays_beside_it() -> None:
    text = "g(float[N, 2] x) => (float[N, 3] y) { k = DequantizeLinear(w, s, o) t2 = Transpose(k) y = MatMul(x, t2) }"
    graph = model(text, w=np.ones((3, 2), np.int8), s=np.float32(1), o=np.int8(0))
    assert not changes(LateDequantizePass(), graph)


# ---------------------------------------------------------------- shapes
def test_computed_shape_becomes_a_constant() -> None:
    text = (
        "g(float[N, 4, 2] x) => (float[N, 8] y) { b = Shape<start=0, end=1>(x) c = Concat<axis=0>(b, r)"
        " y = Reshape<allowzero=1>(x, c) }"
    )
    before, after = (model(text, r=np.array([8])) for _ in range(2))
    assert changes(StaticShapesPass(), after)
    TidyPass()(after)
    assert kinds(after) == ["Reshape"]
    for batch in (1, 3):
        np.testing.assert_array_equal(run(after, pictures(batch, 4, 2)), run(before, pictures(batch, 4, 2)))


def test_shape_with_two_free_dimensions_stays() -> None:
    text = "g(float[N, M] x, int64[2] c) => (float[A, B] y) { y = Reshape(x, c) }"
    assert not changes(StaticShapesPass(), model(text))


# ---------------------------------------------------------------- pooling
@pytest.mark.parametrize("keepdims", [0, 1])
def test_global_mean_becomes_a_pool(keepdims) -> None:
    shape = "N, 3, 1, 1" if keepdims else "N, 3"
    text = f"g(float[N, 3, 4, 4] x) => (float[{shape}] y) {{ y = ReduceMean<keepdims={keepdims}>(x, a) }}"
    before, after = (model(text, a=np.array([2, 3])) for _ in range(2))
    assert changes(GlobalPoolPass(), after)
    assert kinds(after)[0] == "GlobalAveragePool"
    x = pictures(2, 3, 4, 4)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-6, atol=1e-7)


def test_mean_over_one_axis_stays() -> None:
    text = "g(float[N, 3, 4, 4] x) => (float[N, 3, 1, 4] y) { y = ReduceMean<keepdims=1>(x, a) }"
    assert not changes(GlobalPoolPass(), model(text, a=np.array([2])))


# ---------------------------------------------------------------- integer weights
GEMM = "g(float[N, 2] x) => (float[N, 3] y) { y = Gemm<transB=1>(x, w) }"


def grid(scale, axis=0) -> dict[str, Grid]:
    return {"w": Grid(name="w", scale=torch.tensor(scale), bits=8, axis=axis)}


def test_weights_on_a_grid_become_int8_and_decode_to_the_same_bits(tmp_path) -> None:
    scale = np.array([0.1, 0.3, 0.7], np.float32)
    codes = np.array([[1, -127], [0, 5], [127, -3]], np.int8)
    value = codes.astype(np.float32) * scale[:, None]
    before, after = (model(GEMM, w=value) for _ in range(2))
    assert changes(IntegerWeightsPass(grid(scale)), after)
    stored = {name: v.const_value.numpy() for name, v in after.graph.initializers.items()}
    np.testing.assert_array_equal(stored["w"], codes, strict=True)
    np.testing.assert_array_equal(stored["w_scale"], scale[:, None], strict=True)
    np.testing.assert_array_equal(stored["w"].astype(np.float32) * stored["w_scale"], value, strict=True)
    assert kinds(after) == ["Cast", "Mul", "Gemm"]  # the input is float: floats are multiplied
    assert optimized_kinds(after, tmp_path) == {"Gemm": 1}  # decoded at load, not at each inference
    np.testing.assert_array_equal(run(after, pictures(4, 2)), run(before, pictures(4, 2)))


def test_a_weight_that_meets_integers_keeps_its_dequantize_linear() -> None:
    text = (
        "g(float[N, 2] x) => (float[N, 3] y) { c = QuantizeLinear(x, s, z) d = DequantizeLinear(c, s, z)"
        " f = Flatten(d) y = Gemm<transB=1>(f, w) }"
    )
    value = np.array([[0.1, -12.7], [0.0, 0.5], [12.7, -0.3]], np.float32)
    scale = np.float32(0.1)
    value = np.rint(value / scale).astype(np.float32) * scale
    before, after = (model(text, w=value, **{k: GRID[k] for k in "sz"}) for _ in range(2))
    assert changes(IntegerWeightsPass(grid(scale, None)), after)
    assert Counter(kinds(after)) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Flatten": 1, "Gemm": 1}
    np.testing.assert_allclose(run(after, pictures(4, 2)), run(before, pictures(4, 2)), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- dynamic products
def dynamic(product: str, **constants) -> ir.Model:
    text = (
        "g(float[N, 2] x) => (float[N, 3] y) { c, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(c, s, z)"
        f" v = DequantizeLinear<axis=0>(w, t) {product} }}"
    )
    return model(text, w=np.array([[1, -127], [0, 5], [127, -3]], np.int8), t=np.array([0.1, 0.3, 0.7], np.float32), **constants)


@pytest.mark.parametrize("product", ["y = Gemm<transB=1>(d, v, b)", "u = Transpose(v) p = MatMul(d, u) y = Add(p, b)"])
def test_a_dynamic_product_is_one_integer_kernel(product, tmp_path) -> None:
    bias = np.array([1, 2, 3], np.float32)
    before, after = (dynamic(product, b=bias) for _ in range(2))
    assert changes(DynamicMatMulPass(), after)
    TidyPass(frozenset({"w"}))(after)
    assert Counter(kinds(after)) == {
        "DynamicQuantizeLinear": 1, "Transpose": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2, "Add": 1,
    }  # fmt: skip
    assert optimized_kinds(after, tmp_path) == {"DynamicQuantizeMatMul": 1}
    np.testing.assert_allclose(run(after, pictures(4, 2)), run(before, pictures(4, 2)), rtol=1e-5, atol=1e-5)


def test_a_dynamic_product_of_another_form_stays() -> None:
    assert not changes(DynamicMatMulPass(), dynamic("y = Gemm<transB=1, alpha=0.5>(d, v)"))


def test_weights_off_their_grid_are_refused() -> None:
    graph = model(GEMM, w=np.array([[0.1, 0.15]] * 3, np.float32))
    with pytest.raises(ModelError, match=r"w is not on the integer grid it claims; finalize the model again"):
        IntegerWeightsPass(grid([0.1, 0.1, 0.1]))(graph)


# ---------------------------------------------------------------- layers left in float
BETWEEN = (
    "g(float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y) { c = QuantizeLinear(x, s, z) d = DequantizeLinear(c, s, z) h = Conv(d, w)"
    " q = QuantizeLinear(h, t, o) y = DequantizeLinear(q, t, o) }"
)


def test_a_float_layer_between_integers_is_not_rounded_by_the_runtime(tmp_path) -> None:
    value = np.random.default_rng(1).standard_normal((3, 2, 1, 1)).astype(np.float32)
    value[0] *= 100  # with one scale a tensor the other channels would vanish
    grid_ = GRID | {"t": np.float32(0.5), "o": U8(128)}
    before, after = (model(BETWEEN, w=value, **grid_) for _ in range(2))
    assert optimized_kinds(before, tmp_path)["QLinearConv"] == 1  # ONNX Runtime's own doing
    assert changes(KeepFloatPass(), after)
    assert kinds(after) == ["QuantizeLinear", "DequantizeLinear", "Clip", "Conv", "QuantizeLinear", "DequantizeLinear"]
    low, high = (v.const_value.numpy() for name, v in after.graph.initializers.items() if name not in {"w", *grid_})
    np.testing.assert_array_equal([low, high], (np.array([0, 255]) - 93).astype(np.float32) * np.float32(0.047))
    assert optimized_kinds(after, tmp_path)["Conv"] == 1
    x = pictures(4, 2, 4, 4)
    rounded = (np.clip(np.rint(x / GRID["s"]) + 93, 0, 255) - 93).astype(np.float32) * GRID["s"]
    exact = np.clip(np.rint(np.einsum("oi,nihw->nohw", value[:, :, 0, 0], rounded) / 0.5), -128, 127) * 0.5
    assert np.abs(run(after, x) - exact).max() <= 0.5  # one step, where a sum falls on the other side
    assert (run(after, x) != exact).mean() < 0.01
    assert (run(before, x) != exact).mean() > 0.05


def test_integer_layers_and_float_results_need_no_guard() -> None:
    integer = BETWEEN.replace("Conv(d, w)", "Conv(d, v)").replace("h = Conv", "v = DequantizeLinear(w, t, p) h = Conv")
    assert not changes(KeepFloatPass(), model(integer, w=np.ones((3, 2, 1, 1), np.int8), p=np.int8(0), **GRID))
    floats = "g(float[N, 2] x) => (float[N, 3] y) { c = QuantizeLinear(x, s, z) d = DequantizeLinear(c, s, z) y = Gemm(d, w) }"
    assert not changes(KeepFloatPass(), model(floats, w=np.ones((2, 3), np.float32), **{k: GRID[k] for k in "sz"}))


# ---------------------------------------------------------------- channels that kernels are fast for
def inverted_residual(channels: int, middle: str, **changed) -> ir.Model:
    """Stem 3 → 16, expansion, depthwise, `middle`, and a convolution back, all integers; the depthwise one is called e."""
    rng = np.random.default_rng(0)
    shapes = {
        "a": (16, 3, 3, 3),
        "b": (channels, 16, 1, 1),
        "e": (channels, 1, 3, 3),
        "f": (16, channels, 1, 1),
        "h": (channels, 1, 1, 1),
    }
    constants = dict(GRID)
    for name, shape in shapes.items():
        constants[name] = rng.integers(-127, 128, shape).astype(np.int8)
        constants[f"{name}s"] = (rng.random(shape[0]) * 0.01 + 0.001).astype(np.float32)
        constants[f"{name}b"] = rng.standard_normal(shape[0]).astype(np.float32)

    def layer(x: str, y: str, w: str, attributes: str = "") -> str:
        rounded = f"{y}c = Conv{attributes}({x}, {y}w, {w}b) {y}q = QuantizeLinear({y}c, t, o) {y} = DequantizeLinear({y}q, t, o)"
        return f"{y}w = DequantizeLinear<axis=0>({w}, {w}s) {rounded} "

    depthwise = f"<group={channels}, pads=[1, 1, 1, 1]>"
    body = layer("d", "stem", "a", "<strides=[2, 2], pads=[1, 1, 1, 1]>") + layer("stem", "wide", "b")
    body += layer("wide", "deep", "e", depthwise) + middle + " " + layer("mid", "y", "f")
    text = f"g(float[N, 3, 12, 12] x) => (float[N, 16, 6, 6] y) {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {body} }}"
    return model(text, **constants | changed)


SQUEEZE = (
    "p = GlobalAveragePool(deep) pq = QuantizeLinear(p, t, o) pd = DequantizeLinear(pq, t, o)"
    " fw = DequantizeLinear<axis=0>(f, fs) g1 = Conv(pd, fw, fb) g1q = QuantizeLinear(g1, t, o) g1d = DequantizeLinear(g1q, t, o)"
    " vw = DequantizeLinear<axis=0>(b, bs) g2 = Conv(g1d, vw, bb) g2q = QuantizeLinear(g2, t, o) g2d = DequantizeLinear(g2q, t, o)"
    " half = DequantizeLinear(one, t, o) g3 = Add(g2d, half) g3q = QuantizeLinear(g3, t, o) g3d = DequantizeLinear(g3q, t, o)"
    " m = Mul(deep, g3d) mq = QuantizeLinear(m, t, o) mid = DequantizeLinear(mq, t, o)"
)


@pytest.mark.parametrize("middle", ["mid = Relu(deep)", SQUEEZE], ids=["plain", "squeeze-and-excitation"])
def test_channels_become_multiples_of_what_kernels_take_and_no_number_changes(middle, tmp_path) -> None:
    before, after = (inverted_residual(24, middle, one=U8(25)) for _ in range(2))
    stored = {name: v.const_value.numpy() for name, v in after.graph.initializers.items()}
    assert changes(WideChannelsPass(), after)
    depthwise = next(n for n in after.graph if "group" in n.attributes)
    assert depthwise.attributes["group"].as_int() == 32
    for name in "abef":
        np.testing.assert_array_equal(
            after.graph.initializers[name].const_value.numpy(), stored[name]
        )  # the file has the weight itself
    pads = optimized_kinds(after, tmp_path)["Pad"]
    assert pads == 1  # that of the input; those of the weights were carried out at load
    x = pictures(4, 3, 12, 12)
    np.testing.assert_array_equal(run(after, x), run(before, x))


def test_the_values_of_widened_weights_are_read_without_the_zeros() -> None:
    graph = inverted_residual(24, "mid = Relu(deep)")
    before = weight_values(graph)
    WideChannelsPass()(graph)
    after = weight_values(graph)
    for name in "abef":
        np.testing.assert_array_equal(after[name], before[name], strict=True)


@pytest.mark.parametrize(
    ("channels", "middle"),
    [(32, "mid = Relu(deep)"), (6, "mid = Relu(deep)"), (24, "half = Neg(deep) mid = Neg(half)")],
    ids=["already", "too many zeros", "through an operation that is not known"],
)
def test_depthwise_channels_stay(channels, middle) -> None:
    graph = inverted_residual(channels, middle)
    WideChannelsPass()(graph)  # the stem's three inputs become four in any case
    assert next(n for n in graph.graph if "group" in n.attributes).attributes["group"].as_int() == channels
    assert Counter(kinds(graph))["Pad"] == 2


# ---------------------------------------------------------------- half weights
def test_weights_that_are_float16_numbers_take_half_the_bytes(tmp_path) -> None:
    value = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float16).astype(np.float32)
    text = "g(float[N, 64] x) => (float[N, 2] y) { y = MatMul(x, w) }"
    before, after = (model(text, w=value) for _ in range(2))
    assert changes(HalfWeightsPass(), after)
    assert after.graph.initializers["w"].const_value.numpy().dtype == np.float16
    assert optimized_kinds(after, tmp_path) == {"MatMul": 1}  # the Cast is folded at load
    np.testing.assert_array_equal(run(after, pictures(3, 64)), run(before, pictures(3, 64)))


@pytest.mark.parametrize("value", [0.1, 1e-9, 1e6], ids=["rounded", "too small", "too large"])
def test_weights_that_are_no_float16_numbers_stay(value) -> None:
    weight = np.ones((64, 2), np.float32)
    weight[3, 1] = value
    graph = model("g(float[N, 64] x) => (float[N, 2] y) { y = MatMul(x, w) }", w=weight)
    assert not changes(HalfWeightsPass(), graph)


# ---------------------------------------------------------------- names and leftovers
def test_short_names_merge_equal_constants_but_no_weight() -> None:
    text = "g(float[N, 2] x) => (float[N, 2] y) { long_a = MatMul(x, first) long_b = MatMul(long_a, second) b1 = Add(long_b, one) y = Mul(b1, two) }"  # noqa: E501
    weight, scale = np.eye(2, dtype=np.float32), np.float32(3)
    before, after = (model(text, first=weight, second=weight, one=scale, two=scale) for _ in range(2))
    ShortNamesPass(frozenset({"first", "second"}))(after)
    assert set(after.graph.initializers) == {"first", "second", "a"}
    assert [v.name for v in (*after.graph.inputs, *after.graph.outputs)] == ["x", "y"]
    assert all(len(v.name) <= 2 for node in after.graph for v in node.outputs)
    assert len(ir.to_proto(after).SerializeToString()) < len(ir.to_proto(before).SerializeToString())
    np.testing.assert_array_equal(run(after, pictures(3, 2)), run(before, pictures(3, 2)))


def test_names_in_a_subgraph_stay() -> None:
    text = "g(bool c, float[2] x) => (float[2] y) { y = If(c)<then_branch = t() => (float[2] p) { p = Neg(x) }, else_branch = e() => (float[2] q) { q = Abs(x) }> }"  # noqa: E501
    graph = model(text)
    assert not changes(ShortNamesPass(), graph)


def test_tidy_drops_what_nothing_reads_and_never_folds_a_weight() -> None:
    text = "g(float[N, 2] x) => (float[N, 2] y) { i = Identity(x) dead = Neg(i) w2 = Mul(w, two) y = MatMul(i, w2) }"
    graph = model(text, w=np.eye(2, dtype=np.float32), two=np.float32(2))
    TidyPass(frozenset({"w"}))(graph)
    assert kinds(graph) == ["Mul", "MatMul"]
    np.testing.assert_array_equal(graph.graph.initializers["w"].const_value.numpy(), np.eye(2, dtype=np.float32))


def test_tidy_keeps_two_equal_weights_apart_whose_scales_differ() -> None:
    text = (
        "g(float[N, 2] x) => (float[N, 2] y) { d = DequantizeLinear(a, s) h = MatMul(x, d) e = DequantizeLinear(b, t)"
        " i = MatMul(h, e) j = Add(i, one) y = Mul(j, two) }"
    )
    codes, one = np.eye(2, dtype=np.int8), np.float32(1)
    graph = model(text, a=codes, b=codes, s=np.float32(0.5), t=np.float32(0.25), one=one, two=one)
    TidyPass(frozenset({"a", "b"}))(graph)
    assert set(graph.graph.initializers) == {"a", "b", "s", "t", "one"}
    np.testing.assert_array_equal(run(graph, np.eye(2, dtype=np.float32)), [[1.125, 1.0], [1.0, 1.125]])


def test_a_branch_may_hand_on_a_value_of_the_outer_graph():
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[2] x, bool c) => (float[2] y) {
        z = Relu(x)
        w = Identity(z)
        y = If (c) <
            then_branch = t () => (float[2] a) { a = Identity(w) },
            else_branch = e () => (float[2] b) { d = Neg(z) b = Identity(d) }
        >
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    TidyPass()(model)
    onnx.checker.check_model(ir.to_proto(model))
    branches = [a.as_graph() for node in model.graph if node.op_type == "If" for a in node.attributes.values()]
    assert [[n.op_type for n in branch] for branch in branches] == [["Identity"], ["Neg"]]


def test_attributes_with_their_default_value_go() -> None:
    graph = model(
        """g (float[n, 4, 9, 9] x) => (float[n, 4, p, q] y) {
            a = Conv <auto_pad = "NOTSET", pads = [0, 0, 0, 0], strides = [1, 1], dilations = [1, 1], kernel_shape = [3, 3]> (x, w)
            b = Conv <group = 4, pads = [1, 1, 1, 1], strides = [2, 1], dilations = [1, 1]> (a, v)
            c = LeakyRelu <alpha = 0.01> (b)
            d = LeakyRelu <alpha = 0.2> (c)
            e = MaxPool <kernel_shape = [2, 2], strides = [1, 1], ceil_mode = 0> (d)
            y = Softmax <axis = -1> (e)
        }""",
        w=np.random.default_rng(0).standard_normal((4, 4, 3, 3), np.float32),
        v=np.random.default_rng(1).standard_normal((4, 1, 3, 3), np.float32),
    )
    x = np.random.default_rng(2).standard_normal((2, 4, 9, 9), np.float32)
    before = run(graph, x)
    assert DefaultAttributesPass()(graph).modified
    assert [sorted(node.attributes) for node in graph.graph] == [
        ["kernel_shape"],
        ["group", "pads", "strides"],
        [],
        ["alpha"],
        ["kernel_shape"],
        [],
    ]
    np.testing.assert_array_equal(run(graph, x), before)
    assert not DefaultAttributesPass()(graph).modified
