"""`report` tells of each weight what a file holds: bits, bytes with scales and zero points, zeros where zero is, and no weight left out."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_strangers_inspect import CASES, LOOP, model_of, w
from torch import nn

import torchopt

RNG = np.random.default_rng(0)


def rows(tmp_path, model):
    onnx.save(model, tmp_path / "m.onnx")
    return {row.name: row for row in torchopt.report(tmp_path / "m.onnx").rows}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_found_wherever_they_stand(tmp_path, name) -> None:
    build, expected = CASES[name]
    found = rows(tmp_path, build())
    assert list(found) == [layer for layer, _ in expected]
    assert all(row.bytes == 4 * np.prod(row.shape) and row.bits == 32 for row in found.values())


def test_external_data(tmp_path) -> None:
    model = model_of("t = MatMul (x, w) y = MatMul (t, v)", "float[N, 64] x", w=w(64, 64), v=w(64, 8))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
    assert [row.bytes for row in torchopt.report(tmp_path / "m.onnx").rows] == [64 * 64 * 4, 64 * 8 * 4]


def coded(
    body: str, kind: str, zero, scale: np.ndarray, codes: np.ndarray | None = None, shape=(16, 32), **more
) -> onnx.ModelProto:
    """A weight of integers, `w`, its scale `s` and zero point `z`."""
    made = model_of(body, "float[N, 32] x", s=scale, **more)
    number, count = getattr(TensorProto, kind.upper()), int(np.prod(shape))
    codes = RNG.integers(0, 15, count) if codes is None else codes.reshape(-1)
    made.graph.initializer.append(helper.make_tensor("w", number, shape, codes))
    made.graph.initializer.append(helper.make_tensor("z", number, np.shape(zero), np.reshape(zero, -1)))
    return made


QDQ = "k = DequantizeLinear <axis = 0{}> (w, s, z) t = Transpose <perm = [1, 0]> (k) y = MatMul (x, t)"
BLOCKS = QDQ.format(", block_size = 8").replace("axis = 0", "axis = 1")
DYNAMIC = """q, xs, xz = DynamicQuantizeLinear (x) p = MatMulInteger (q, w, xz, z) f = Cast <to = 1> (p)
    m = Mul (xs, s) y = Mul (f, m)"""
FORMS = {
    "a scale a channel": (coded(QDQ.format(""), "int8", np.zeros(16, int), np.ones(16, np.float32)), 16 * 32 + 16 * 5, "int5"),
    "a scale a tensor": (coded(QDQ.format(""), "uint8", 3, np.float32(1)), 16 * 32 + 5, "int5"),
    "int4": (coded(QDQ.format(""), "int4", np.zeros(16, int), np.ones(16, np.float32), RNG.integers(-8, 8, 512)), 256 + 64 + 8, "int4"),
    "int16": (coded(QDQ.format(""), "int16", 0, np.float32(1), RNG.integers(-32768, 32767, 512)), 1024 + 4 + 2, "int16"),
    "scales of blocks": (coded(BLOCKS, "uint8", np.full((16, 4), 7), np.ones((16, 4), np.float32)),
                         16 * 32 + 16 * 4 * 5, "int4"),
    "dynamic": (coded(DYNAMIC, "int8", 0, np.float32(1), shape=(32, 16)), 32 * 16 + 5, "int5"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_scales_and_zero_points_count_with_their_weight(tmp_path, name) -> None:
    model, size, technique = FORMS[name]
    found = rows(tmp_path, model)
    assert list(found) == ["w"], "a scale is no weight"
    assert found["w"].bytes == size
    assert found["w"].techniques[-1] == technique
    assert torchopt.report(tmp_path / "m.onnx").totals["weights"] == 512


def test_zeros_are_counted_at_the_zero_point(tmp_path) -> None:
    codes = np.repeat(np.arange(16), 32)  # row r holds r, and its zero point is r, or one more
    zero = np.arange(16) + np.arange(16) % 2
    found = rows(tmp_path, coded(QDQ.format(""), "uint8", zero, np.ones(16, np.float32), codes))
    assert found["w"].sparsity == 0.5
    assert found["w"].distinct_values == 2


def test_a_weight_in_blocks_of_bytes(tmp_path) -> None:
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", N=8, K=64, bits=4, block_size=32)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size]) for n, size in (("x", 64), ("y", 8))]
    codes = RNG.integers(0, 255, (8, 2, 16)).astype(np.uint8)
    tensors = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(np.ones((8, 2), np.float32), "s")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    found = rows(tmp_path, helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert (list(found), found["w"].shape, found["w"].bytes, found["w"].bits) == (["w"], (8, 64), 256 + 64, 5.0)


@pytest.mark.parametrize(("kind", "number"), [(np.float16, 10), ("bfloat16", 16)])
def test_half_floats(tmp_path, kind, number) -> None:
    model = model_of(f"h = Cast <to = {number}> (x) t = MatMul (h, w) y = Cast <to = 1> (t)")
    tensor = helper.make_tensor("w", number, (8, 4), RNG.standard_normal(32)) if kind == "bfloat16" else None
    model.graph.initializer.append(tensor or numpy_helper.from_array(w(8, 4).astype(kind), "w"))
    onnx.save(model, tmp_path / "m.onnx")
    (row,) = torchopt.report(tmp_path / "m.onnx").rows
    assert (row.bits, row.bytes, row.techniques[-1]) == (16, 64, "bfloat16" if number == 16 else "float16")


def test_masks_states_and_biases_are_no_weights(tmp_path) -> None:
    body = "m = Add (x, mask) y, h = GRU <hidden_size = 4> (m, a, r, b, , h0)"
    zeros, mask = np.zeros((1, 1, 4), np.float32), np.where(np.tri(8, dtype=bool), 0, -np.inf).astype(np.float32)[:, None]
    found = rows(tmp_path, model_of(body, "float[8, 1, 8] x", a=w(1, 12, 8), r=w(1, 12, 4), b=w(1, 24), h0=zeros, mask=mask))
    assert list(found) == ["a", "r"]


def test_rows_come_in_the_order_of_the_layers_packed_or_not(tmp_path) -> None:
    tables = [RNG.standard_normal(4).astype(np.float32)[RNG.integers(0, 4, (64, 64))] for _ in range(3)]
    model = model_of(
        "a = MatMul (x, v) b = MatMul (a, w) y = MatMul (b, u)", "float[N, 64] x", w=tables[0], u=tables[1], v=w(64, 64)
    )
    assert list(rows(tmp_path, model)) == ["v", "w", "u"]
    packed = torchopt.pack(tmp_path / "m.onnx", tmp_path / "p.onnx")
    found = torchopt.report(tmp_path / "p.onnx").rows
    assert [row.name for row in found] == ["v", "w", "u"]
    assert [row.bytes for row in found] == [64 * 64 * 4, *(row.packed_bytes for row in packed.rows)]
    assert all("clustered" in row.techniques for row in found[1:])


def test_packed_weights_of_a_body(tmp_path) -> None:
    table = RNG.standard_normal(4).astype(np.float32)[RNG.integers(0, 4, (64, 64))]
    model = model_of(LOOP.replace("N, 8", "N, 64"), "float[N, 64] x", w=table)
    onnx.save(model, tmp_path / "m.onnx")
    packed = torchopt.pack(tmp_path / "m.onnx", tmp_path / "p.onnx")
    (row,) = torchopt.report(tmp_path / "p.onnx").rows
    assert (row.name, row.distinct_values, row.bytes) == ("w", 4, packed.rows[0].packed_bytes)


def rounded(bits: int, kept: float, spread: float) -> np.ndarray:
    """Normal weights, some of them masked, on a grid of so many bits."""
    values = RNG.standard_normal(4096)
    values[np.abs(values) < np.quantile(np.abs(values), 1 - kept)] = 0
    most = 2 ** (bits - 1) - 1
    return np.clip(np.round(values * most / spread), -most, most).astype(np.int8)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_zeros_by_rounding_are_no_pruning(tmp_path, bits, spread) -> None:
    codes = rounded(bits, 1.0, spread)
    codes[0] = -(2 ** (bits - 1)) + 1
    model = coded(QDQ.format(""), "int8", 0, np.float32(1), codes, shape=(128, 32))
    (row,) = rows(tmp_path, model).values()
    assert row.techniques == (f"int{bits}",)
    assert row.sparsity == (codes == 0).mean()


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("kept", [0.2, 0.5])
def test_masks_are_seen_under_a_grid(tmp_path, bits, kept) -> None:
    (row,) = rows(tmp_path, coded(QDQ.format(""), "int8", 0, np.float32(1), rounded(bits, kept, 4.0), shape=(128, 32))).values()
    assert "pruned" in row.techniques


def layers_of(**quantize: object) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), torch.randn(16, 64)
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize(**quantize))]
    return torchopt.one_shot(net, rules, [x], example_inputs=(x[:1],), progress=False), x


@pytest.mark.parametrize(
    ("quantize", "pack", "technique"),
    [
        ({"mode": "float16"}, False, "float16"),
        ({"mode": "weight_only", "weight_bits": 4, "block_size": 32}, False, "int4"),
        ({"mode": "weight_only", "weight_bits": 3}, True, "int3"),
        ({"mode": "dynamic", "weight_bits": 4}, True, "int4"),
    ],
)
def test_the_report_of_a_model_is_that_of_its_file(tmp_path, quantize, pack, technique) -> None:
    final, x = layers_of(**quantize)
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=pack)
    ours, theirs = torchopt.report(final).rows, torchopt.report(tmp_path / "m.onnx").rows
    assert ours == theirs
    assert {row.techniques for row in ours} == {(technique,)}
