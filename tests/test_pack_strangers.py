"""ONNX files that were not made here: sparse constants, typed data, functions, training information, second files; bit for bit."""

import contextlib
import io
import logging
import tracemalloc

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.transformers import float16
from test_pack_onnx import graph_of, run, weight
from torch import nn

import torchopt
from torchopt.export import decode_initializers, unpack
from torchopt.pack import pack


def tensors(path) -> dict[str, tuple]:
    """Type, shape and bytes of every initializer."""
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()}


def round_trip(tmp_path, packed: list[str]) -> None:
    """Pack a.onnx and unpack it again: equal outputs, equal tensors, and these are packed."""
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == packed
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "c.onnx"))
    before, after = tensors(tmp_path / "a.onnx"), tensors(tmp_path / "c.onnx")
    assert {name: after[name] for name in before} == before


def coo(w: np.ndarray, name: str, *, by_dimension: bool) -> onnx.SparseTensorProto:
    places = np.argwhere(w) if by_dimension else np.flatnonzero(w)
    values = numpy_helper.from_array(w[w != 0], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64), f"{name}_places"), w.shape)


@pytest.mark.parametrize("by_dimension", [False, True])
def test_P7_sparse_initializers_and_constants(tmp_path, by_dimension):
    w = weight(0.95, 1000)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["x", "v"], ["b"])]
    nodes.insert(0, helper.make_node("Constant", [], ["v"], sparse_value=coo(w, "v", by_dimension=by_dimension)))
    graph_of(
        tmp_path / "a.onnx", [*nodes, helper.make_node("Sub", ["a", "b"], ["d"]), helper.make_node("Add", ["a", "d"], ["y"])], []
    )
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.sparse_initializer.append(coo(w, "w", by_dimension=by_dimension))
    onnx.save(model, tmp_path / "a.onnx")
    round_trip(tmp_path, ["w", "v"])
    assert (tmp_path / "b.onnx").stat().st_size < 0.6 * (tmp_path / "a.onnx").stat().st_size
    for name in "wv":
        np.testing.assert_array_equal(decode_initializers(tmp_path / "b.onnx")[name], w)


@pytest.mark.parametrize(
    ("places", "dims", "message"),
    [
        ([0, 5], [1 << 20, 1 << 20], r"claims to have the shape \(1048576, 1048576\)"),
        ([0, 5], [-2, -8], "claims to have the shape"),
        ([0, 16], [4, 4], r"a place of sparse tensor 'w' lies outside its shape \(4, 4\)"),
        ([[0, 1], [4, 0]], [4, 4], "lies outside"),
        ([[0, 1, 2], [3, 0, 1]], [4, 4], "lies outside"),
        ([0, 1, 2], [4, 4], "lies outside"),
    ],
)
def test_P7_sparse_tensors_that_lie_are_refused(tmp_path, places, dims, message):
    graph_of(tmp_path / "a.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [])
    model = onnx.load(tmp_path / "a.onnx")
    sparse = model.graph.sparse_initializer.add(values=numpy_helper.from_array(np.float32([1, 2]), "w"), dims=dims)
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array(places, np.int64)))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(torchopt.FileError, match=f"is no whole ONNX file .*{message}"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_P7_typed_data_wide_types_and_what_packing_does_not_know_stay_bit_for_bit(tmp_path):
    w = weight(0.8, 16)
    typed = helper.make_tensor("w", TensorProto.FLOAT, w.shape, w.reshape(-1).tolist())
    assert typed.float_data
    assert not typed.raw_data
    wide = np.arange(2000, dtype=np.int64) % 7
    others = [numpy_helper.from_array(wide, "long"), numpy_helper.from_array(wide.astype(np.uint16), "short")]
    others += [helper.make_tensor("half", TensorProto.BFLOAT16, [2000], (wide / 3).tolist())]
    others += [helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"b"])]
    graph_of(tmp_path / "a.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [typed, *others])
    model = onnx.load(tmp_path / "a.onnx")
    model.metadata_props.add(key="author", value="someone else")
    model.training_info.add().algorithm.name = "none"
    model.graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    onnx.save(model, tmp_path / "a.onnx")
    round_trip(tmp_path, ["w"])
    back = onnx.load(tmp_path / "c.onnx")
    assert back.metadata_props == model.metadata_props
    assert back.training_info == model.training_info
    assert back.graph.quantization_annotation == model.graph.quantization_annotation


def test_P7_the_large_constants_of_functions_and_loops_are_packed_and_come_back(tmp_path):
    w = weight(0.8, 16)
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(w))
    function = helper.make_function(
        "theirs",
        "Twice",
        ["x"],
        ["y"],
        [constant, helper.make_node("MatMul", ["x", "v"], ["a"]), helper.make_node("Add", ["a", "a"], ["y"])],
        [helper.make_opsetid("", 21)],
    )
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["u"], value=numpy_helper.from_array(w)),
            helper.make_node("MatMul", ["x", "u"], ["inner"]),
            helper.make_node("MatMul", ["x", "w"], ["outer"]),
            helper.make_node("Sum", ["before", "inner", "outer"], ["after"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Twice", ["x"], ["t"], domain="theirs")]
    nodes += [helper.make_node("Loop", ["three", "", "t"], ["y"], body=body)]
    graph_of(tmp_path / "a.onnx", nodes, [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.int64(3), "three")])
    model = onnx.load(tmp_path / "a.onnx")
    model.functions.append(function)
    model.opset_import.add(domain="theirs", version=1)
    onnx.save(model, tmp_path / "a.onnx")
    round_trip(tmp_path, ["w", "u", "v"])
    back = onnx.load(tmp_path / "c.onnx")
    assert list(back.functions) == [function]
    assert list(back.graph.node) == nodes


@pytest.mark.parametrize("size", [3, 5])
def test_P7_second_files_are_read_and_written(tmp_path, size):
    """Also tensors of constants, of two files, and of a folder below."""
    w = weight(0.8, 16)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "one.bin").write_bytes(bytes(size) + w.tobytes())
    graph_of(tmp_path / "a.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [numpy_helper.from_array(w, "w")])
    model = onnx.load(tmp_path / "a.onnx")
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "below/one.bin", size, w.nbytes)
    model.graph.initializer[0].ClearField("raw_data")
    onnx.save(model, tmp_path / "a.onnx")
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert (tmp_path / "c.onnx.data").read_bytes() == w.tobytes()
    pack(tmp_path / "c.onnx", tmp_path / "c.onnx")  # onto itself
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "c.onnx"))
    names = ["a.onnx", "b.onnx", "b.onnx.data", "below", "c.onnx", "c.onnx.1.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def trained() -> nn.Sequential:
    """A small convolutional network whose weights share values, as a stranger may have it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                step = p.abs().max() / 7
                p.copy_((p / step).round() * step)
    return model


def made_by(maker: str, folder) -> None:
    """a.onnx as another tool writes it."""
    path, x = str(folder / "a.onnx"), torch.zeros(1, 3, 8, 8)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if maker == "torch, dynamo":
            torch.onnx.export(trained(), (x,), path, dynamo=True, input_names=["x"], external_data=False, verbose=False)
            return
        torch.onnx.export(trained(), (x,), path, dynamo=False, input_names=["x"], opset_version=13)
        if maker == "dynamic quantizer":
            quantization.quantize_dynamic(path, path)
        elif maker == "static quantizer":
            batches = iter([{"x": np.random.default_rng(i).standard_normal((1, 3, 8, 8)).astype(np.float32)} for i in range(3)])
            reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: next(batches, None)})()
            quantization.quantize_static(path, path, reader, per_channel=True)
        elif maker == "float16 converter":
            onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "maker", ["torch, legacy", "torch, dynamo", "dynamic quantizer", "static quantizer", "float16 converter"]
)
def test_P7_files_of_other_makers(tmp_path, maker):
    logging.disable(logging.CRITICAL)
    try:
        made_by(maker, tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert len(report.rows) >= 2
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    x = np.random.default_rng(9).standard_normal((1, 3, 8, 8)).astype(np.float32)
    outputs = []
    for name in "abc":
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        opened = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        outputs.append(opened.run(None, {opened.get_inputs()[0].name: x})[0])
    np.testing.assert_array_equal(outputs[1], outputs[0])
    np.testing.assert_array_equal(outputs[2], outputs[0])
    before, after = tensors(tmp_path / "a.onnx"), tensors(tmp_path / "c.onnx")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("dtype", "sparsity", "values"), [("float32", 0.6, 0), ("float32", 0.0, 16), ("int8", 0.8, 16), ("int8", 0.0, 50)]
)
def test_P7_memory_is_at_most_three_times_the_largest_tensor(tmp_path, dtype, sparsity, values):
    """Beyond the file, whose pages the system may drop; numpy tells tracemalloc what it takes."""
    rng, side = np.random.default_rng(0), 4096 if dtype == "int8" else 2048
    nodes, constants = [], []
    for i in range(2):
        w = rng.standard_normal((side, side), np.float32)
        w = rng.integers(1, values, (side, side)).astype(dtype) if values else w
        w[rng.random(w.shape, np.float32) < sparsity] = 0
        constants.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("Identity", [f"w{i}"], [f"y{i}"]))
    graph_of(tmp_path / "a.onnx", nodes, constants, outputs=[f"y{i}" for i in range(2)])
    for verb, source, target in ((pack, "a", "b"), (unpack, "b", "c")):
        tracemalloc.start()
        verb(tmp_path / f"{source}.onnx", tmp_path / f"{target}.onnx")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        packed = (tmp_path / "b.onnx").stat().st_size
        assert peak - (packed if verb is pack else 0) < 3 * w.nbytes
    assert tensors(tmp_path / "a.onnx") == tensors(tmp_path / "c.onnx")
