"""Packed ONNX files: bit-equal outputs, the same tensors unpacked, nothing touched that must stay as it is."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import torchopt
from torchopt.export import decode_initializers, unpack
from torchopt.pack import pack


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
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, opened.get_inputs()[0].shape[1])).astype(np.float32)
    return opened.run(None, {"x": x})[0]


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


@pytest.mark.parametrize(
    ("opset", "message"),
    [(6, "6, and ONNX Runtime runs 7 and newer; export it again"), (30, "30; convert it to one of 12 to [0-9]+")],
)
def test_opsets_that_cannot_decode_are_refused(tmp_path, opset, message):
    write(tmp_path / "a.onnx", weight(0.8, 16), opset=opset)
    with pytest.raises(torchopt.ModelError, match=f"pack: the model has opset {message}"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_P7_what_stays_dense_and_why(tmp_path):
    """One weight of each reason; large Constant nodes and initializers of branches are packed like initializers."""
    w = weight(0.8, 16)
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["then"])],
        "g",
        [],
        [helper.make_tensor_value_info("then", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "inner")],
    )
    nodes = [helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(w))]
    nodes += [helper.make_node("If", ["flag"], ["branch"], then_branch=inner, else_branch=inner)]
    nodes += [helper.make_node("DequantizeLinear", ["four", "scale"], ["f"])]
    nodes += [helper.make_node("MatMul", ["x", n], [f"y{n}"]) for n in ("constant", "given", "shown", "noise", "f")]
    nodes += [helper.make_node("Sum", ["branch", *(f"y{n}" for n in ("constant", "given", "shown", "noise", "f"))], ["y"])]
    values = {name: w for name in ("given", "shown", "unread")} | {"flag": np.array(True), "scale": np.float32(1)}
    values |= {"noise": np.random.default_rng(0).standard_normal(w.shape).astype(np.float32)}
    values |= {"four": (np.arange(w.size).reshape(w.shape) % 5).astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4))}
    given = helper.make_tensor_value_info("given", TensorProto.FLOAT, w.shape)
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph_of(tmp_path / "a.onnx", nodes, constants, [given], ("y", "shown"))
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == ["constant", "inner", "branch/then_branch/inner"]
    assert {entry.name: entry.reason for entry in report.left} == {
        "given": "inputs of the model too, which a caller may replace",
        "shown": "outputs of the model too",
        "noise": "no smaller form",
        "four": "of type int4",
        "unread": "read by no node",
    }
    assert "left dense: 1 of 49,152 bytes: no smaller form" in str(report)
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


def test_missing_file(tmp_path):
    with pytest.raises(torchopt.FileError, match=r"no\.onnx: there is no such file"):
        pack(tmp_path / "no.onnx", tmp_path / "b.onnx")


def test_a_packed_file_stays_as_it_is(tmp_path):
    write(tmp_path / "a.onnx", weight(0.8, 16))
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert pack(tmp_path / "b.onnx", tmp_path / "c.onnx").rows == []
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def graph_of(path, nodes, constants, inputs=(), outputs=("y",)) -> None:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 96]), *inputs]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", values, results, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def test_names_of_ours_in_use_are_left_alone(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["_0"]), helper.make_node("Relu", ["_0"], ["_1"])]
    nodes += [helper.make_node("Neg", ["_1"], ["y"])]
    graph_of(tmp_path / "a.onnx", nodes, [numpy_helper.from_array(weight(0.8, 16), "w")])
    assert len(pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows) == 1
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


def test_weights_that_are_inputs_or_outputs_are_left_alone_and_those_in_a_branch_are_packed(tmp_path):
    shape = [96, 128]
    branch = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", w], [f"y{w}"])],
            w,
            [],
            [helper.make_tensor_value_info(f"y{w}", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(weight(0.8, 16), w)] if w == "inner" else [],
        )
        for w in ("inner", "outer")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "limit"], ["flag"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch[0], else_branch=branch[1]),
    ]
    constants = [numpy_helper.from_array(weight(0.8, 16), name) for name in ("outer", "given", "shown")]
    constants.append(numpy_helper.from_array(np.float32(1e9), "limit"))
    graph_of(
        tmp_path / "a.onnx",
        nodes,
        constants,
        [helper.make_tensor_value_info("given", TensorProto.FLOAT, shape)],
        ("y", "shown"),
    )
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == ["outer", "inner"]
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    before, after = ({i.name: i for i in onnx.load(tmp_path / f).graph.initializer} for f in ("a.onnx", "c.onnx"))
    assert set(before) == set(after)
    for name in before:
        np.testing.assert_array_equal(numpy_helper.to_array(before[name]), numpy_helper.to_array(after[name]))


def test_equal_weights_are_stored_once_and_constants_as_one_value(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["x", "v"], ["b"])]
    nodes += [helper.make_node("MatMul", ["x", "c"], ["d"]), helper.make_node("Sum", ["a", "b", "d"], ["y"])]
    constants = [numpy_helper.from_array(weight(0.5, 16), name) for name in ("w", "v")]
    constants.append(numpy_helper.from_array(np.full((96, 128), 0.5, np.float32), "c"))
    graph_of(tmp_path / "a.onnx", nodes, constants)
    rows = {row.name: row for row in pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows}
    assert (rows["c"].codec, rows["c"].packed_bytes, rows["c"].entropy_bytes) == ("one", 4, 4)
    assert (tmp_path / "b.onnx").stat().st_size < rows["w"].packed_bytes + 3_000
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))
    np.testing.assert_array_equal(decode_initializers(tmp_path / "b.onnx")["c"], np.full((96, 128), 0.5, np.float32))
