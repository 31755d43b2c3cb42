"""Packed ONNX files: bit-equal outputs, decoded once at load, unpacked to the same tensors, and never a crash."""

import collections
import contextlib

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import torchopt
from torchopt.export.pack import decode_initializers, pack, unpack

KINDS = {
    "codes": (0.0, 16),
    "three bits": (0.0, 7),
    "mask": (0.5, 16),
    "gaps": (0.9, 16),
    "one value": (0.9, 2),
    "raw": (0.6, 10_000),
}


def weight(sparsity: float, values: int, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    pool = rng.permutation(np.r_[-128:0, 1:128])[: values - 1] if dtype == np.int8 else rng.standard_normal(values - 1)
    w = rng.choice(pool, size=(96, 128)).astype(dtype)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def write(path, w: np.ndarray, opset: int = 21) -> None:
    if w.dtype == np.int8:
        nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
        constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.float32(0.1), "s")]
    else:
        nodes, constants = [helper.make_node("MatMul", ["x", "w"], ["y"])], [numpy_helper.from_array(w, "w")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", w.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", w.shape[1]])
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)


def run(path, optimized=None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized:
        options.optimized_model_filepath = str(optimized)
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("dtype", [np.float32, np.int8], ids=["float", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_bit_equal_and_decoded_at_load(tmp_path, kind, dtype):
    sparsity, values = KINDS[kind]
    if dtype == np.int8 and values > 255:
        pytest.skip("int8 has at most 255 nonzero values: no raw codec is needed")
    write(tmp_path / "a.onnx", weight(sparsity, values, dtype))
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == ["w"]
    assert (tmp_path / "b.onnx").stat().st_size < (tmp_path / "a.onnx").stat().st_size
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx", tmp_path / "o.onnx"))
    kernels = collections.Counter(node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node)
    assert set(kernels) <= {"MatMul", "MatMulNBits", "DequantizeLinear"}, kernels


@pytest.mark.parametrize("kind", KINDS)
def test_unpack_is_the_inverse(tmp_path, kind):
    w = weight(*KINDS[kind])
    write(tmp_path / "a.onnx", w)
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    back = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "c.onnx").graph.initializer}
    assert set(back) == {"w"}
    np.testing.assert_array_equal(back["w"].view(np.uint8), w.view(np.uint8))
    assert not onnx.load(tmp_path / "c.onnx").functions


def test_pack_twice_changes_nothing_more(tmp_path):
    write(tmp_path / "a.onnx", weight(0.8, 16))
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    before = decode_initializers(tmp_path / "b.onnx")["w"]
    pack(tmp_path / "b.onnx", tmp_path / "b.onnx")
    np.testing.assert_array_equal(decode_initializers(tmp_path / "b.onnx")["w"], before)


def test_decode_initializers_multiplies_by_the_scale(tmp_path):
    w = weight(0.8, 16, np.int8)
    write(tmp_path / "a.onnx", w)
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    np.testing.assert_array_equal(decode_initializers(tmp_path / "b.onnx")["w"], w.astype(np.float32) * np.float32(0.1))


def test_old_opset_is_refused(tmp_path):
    write(tmp_path / "a.onnx", weight(0.8, 16), opset=17)
    with pytest.raises(torchopt.ModelError, match="pack: the model has opset 17; convert it to 18 or later"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_missing_file(tmp_path):
    with pytest.raises(torchopt.FileError, match=r"no\.onnx: there is no such file"):
        pack(tmp_path / "no.onnx", tmp_path / "b.onnx")


def mutated(data: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    kind, broken = seed % 4, bytearray(data)
    if kind == 0:
        return bytes(broken[: rng.integers(0, len(data))])
    if kind == 1:
        return rng.bytes(int(rng.integers(0, 2000)))
    for _ in range(int(rng.integers(1, 40))):
        broken[rng.integers(0, len(broken))] = rng.integers(0, 256)
    if kind == 3:
        start = int(rng.integers(0, len(broken)))
        del broken[start : start + int(rng.integers(1, 200))]
    return bytes(broken)


def fuzz(tmp_path, count: int) -> None:
    write(tmp_path / "a.onnx", weight(0.9, 16)[:32, :64])
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    sources = [(tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx")]
    (tmp_path / "out.onnx").write_bytes(b"old")
    for seed in range(count):
        (tmp_path / "m.onnx").write_bytes(mutated(sources[seed % 2], seed))
        for verb in (pack, unpack):
            try:
                verb(tmp_path / "m.onnx", tmp_path / "out.onnx")
                (tmp_path / "out.onnx").write_bytes(b"old")
            except torchopt.TorchoptError:
                assert (tmp_path / "out.onnx").read_bytes() == b"old"
        with contextlib.suppress(torchopt.TorchoptError):
            decode_initializers(tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "m.onnx", "out.onnx"]


def test_mutated_files_do_no_harm(tmp_path):
    fuzz(tmp_path, 200)


@pytest.mark.slow
def test_mutated_files_do_no_harm_5000(tmp_path):
    fuzz(tmp_path, 5000)
