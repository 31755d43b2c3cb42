"""What packing leaves as it was, converts, strips and says: exact inverses, old operator sets, files with nothing to pack."""

import contextlib
import json
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_pack_onnx import graph_of, run, weight, write
from test_web import unpack_in_node

import torchopt
from torchopt.cli.commands import status
from torchopt.export import decode_initializers, export, unpack
from torchopt.onnx_file import older
from torchopt.pack import pack

W = weight(0.8, 16)


def documented(path):
    """A model in which everything has documentation, metadata, a name and a place: initializers, Constants, a branch, a function."""
    text = """<ir_version: 10, opset_import: ["": 21, "theirs": 1]> g (float[3, 96] x, bool flag) => (float[3, 128] y)
        <float[2] a = {1, 2}, float[1] w1 = {0}, float[2] b = {3, 4}, float[1] w2 = {0}, float[2] c = {5, 6}>
        {m1 = MatMul (x, w1)  k = Constant <value = float[1] {0}> ()  m2 = MatMul (x, w2)  m3 = MatMul (x, k)  f = theirs.F (x)
         i = If (flag) <then_branch = t () => (p) <float[1] v1 = {0}, float[2] d = {1, 2}> {u = Constant <value = float[1] {0}> ()
              q = MatMul (x, u)  r = MatMul (x, v1)  p = Add (q, r)}, else_branch = e () => (s) {s = MatMul (x, w1)}>
         y = Sum (m1, m2, m3, i, f)}
        <domain: "theirs", opset_import: ["": 21]> F (x) => (y) {z = Constant <value = float[1] {0}> ()  y = MatMul (x, z)}"""
    model = ir.to_proto(ir.from_onnx_text(text))
    then = next(n for n in model.graph.node if n.op_type == "If").attribute[0].g
    for number, tensor in enumerate([*model.graph.initializer, *then.initializer]):
        if tensor.name[0] in "wv":
            tensor.CopyFrom(numpy_helper.from_array(np.roll(W, number), tensor.name))
        tensor.doc_string = f"doc of {tensor.name}"
        tensor.metadata_props.add(key="of", value=tensor.name)
    for nodes in (model.graph.node, then.node, model.functions[0].node):
        for node in nodes:
            node.name, node.doc_string = f"node of {node.output[0]}", f"doc of {node.output[0]}"
            node.metadata_props.add(key="namespace", value=f"pkg of {node.output[0]}")
            if node.op_type == "Constant":
                node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.roll(W, 9), f"tensor of {node.output[0]}"))
    for name in ("w1", "m1", "k", "a"):
        info = model.graph.value_info.add()
        info.CopyFrom(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, W.shape if name in ("w1", "k") else [2], f"doc of {name}")
        )
        info.metadata_props.add(key="pkg.torch.onnx.original_node_name", value=name)
    onnx.save(model, path)
    return model


def test_unpacking_gives_everything_back(tmp_path):
    """The whole message: names, documentation, metadata, types, and the order of initializers and nodes, in all scopes."""
    model = documented(tmp_path / "a.onnx")
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == ["w1", "w2", "k", "v1", "u", "z"]
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    back = onnx.load(tmp_path / "c.onnx")
    assert [t.name for t in back.graph.initializer] == ["a", "w1", "b", "w2", "c"]
    assert back == model


def test_an_old_file_format_comes_back(tmp_path):
    write(tmp_path / "a.onnx", W, opset=13)
    model = onnx.load(tmp_path / "a.onnx")
    model.ir_version = 6
    onnx.save(model, tmp_path / "a.onnx")
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert onnx.load(tmp_path / "b.onnx").ir_version == 8
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert onnx.load(tmp_path / "c.onnx") == model


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("target", ["a.onnx", "b.onnx"])
def test_a_file_with_nothing_to_pack_stays_byte_for_byte(tmp_path, beside, target):
    noise = np.random.default_rng(0).standard_normal((96, 128)).astype(np.float32)
    write(tmp_path / "a.onnx", noise)
    model = onnx.load(tmp_path / "a.onnx")
    data = model.SerializeToString() + b"\xfa\x3e\x03odd"  # a field that nobody knows
    if beside:
        onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
        data = (tmp_path / "a.onnx").read_bytes()
    (tmp_path / "a.onnx").write_bytes(data)
    assert pack(tmp_path / "a.onnx", tmp_path / target).rows == []
    assert (tmp_path / target).read_bytes() == data
    np.testing.assert_array_equal(run(tmp_path / target), run(tmp_path / "a.onnx"))


def test_nothing_to_pack_and_data_beside_it_in_another_folder(tmp_path):
    write(tmp_path / "a.onnx", np.random.default_rng(0).standard_normal((96, 128)).astype(np.float32))
    onnx.save(onnx.load(tmp_path / "a.onnx"), tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    (tmp_path / "there").mkdir()
    assert pack(tmp_path / "a.onnx", tmp_path / "there" / "b.onnx").rows == []
    np.testing.assert_array_equal(run(tmp_path / "there" / "b.onnx"), run(tmp_path / "a.onnx"))


def test_strip_takes_out_the_exporters_notes_and_nothing_else(tmp_path, capsys):
    model = documented(tmp_path / "a.onnx")
    assert status(["pack", "--strip", "--json", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 6
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    back = onnx.load(tmp_path / "c.onnx")
    assert b"pkg" not in (tmp_path / "c.onnx").read_bytes()
    assert [t.doc_string for t in back.graph.initializer] == [t.doc_string for t in model.graph.initializer]
    assert [n.doc_string for n in back.graph.node] == [n.doc_string for n in model.graph.node]
    pack(tmp_path / "a.onnx", tmp_path / "d.onnx")
    assert (tmp_path / "d.onnx").stat().st_size - (tmp_path / "b.onnx").stat().st_size > 300
    assert b"pkg" in (tmp_path / "d.onnx").read_bytes()


def old(path, opset):
    """A network whose operators have changed since: Dropout, BatchNormalization, Upsample, Softmax over two axes."""
    rng = np.random.default_rng(0)
    w = rng.choice(rng.standard_normal(9).astype(np.float32), (16, 3, 3, 3))
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Dropout", ["a"], ["b"], ratio=0.4)]
    nodes.append(helper.make_node("Upsample", ["b", "scales"], ["c"]) if opset > 8 else helper.make_node("Relu", ["b"], ["c"]))
    nodes.append(helper.make_node("Softmax", ["c"], ["y"], axis=2))
    x, y = helper.make_tensor_value_info("x", 1, ["n", 3, 8, 8]), helper.make_tensor_value_info("y", 1, None)
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.float32([1, 1, 2, 2]), "scales")][: 1 + (opset > 8)]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4, producer_name="someone")
    model.metadata_props.add(key="author", value="someone else")
    onnx.save(model, path)


@pytest.mark.parametrize("opset", [7, 8, 9])
def test_old_operator_sets_are_converted(tmp_path, opset):
    old(tmp_path / "a.onnx", opset)
    source = (tmp_path / "a.onnx").read_bytes()
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == ["w"]
    packed = onnx.load(tmp_path / "b.onnx")
    assert {entry.domain: entry.version for entry in packed.opset_import} == {"": 12, "torchopt": 1}
    assert (packed.producer_name, packed.metadata_props[0].value) == ("someone", "someone else")
    x = np.random.default_rng(5).standard_normal((3, 3, 8, 8)).astype(np.float32)
    outputs = [session(tmp_path / f"{name}.onnx").run(None, {"x": x})[0] for name in "ab"]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    np.testing.assert_array_equal(session(tmp_path / "c.onnx").run(None, {"x": x})[0], outputs[0])
    assert (tmp_path / "a.onnx").read_bytes() == source


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("fault", ["another factor", "a tensor", "an exception"])
def test_a_conversion_that_is_wrong_is_refused(tmp_path, monkeypatch, fault):
    write(tmp_path / "a.onnx", W, opset=9)
    real = onnx.version_converter.convert_version

    def wrong(model, opset):
        if fault == "an exception":
            raise RuntimeError("no adapter")
        new = real(model, opset)
        if fault == "a tensor":
            new.graph.initializer[0].raw_data = (2 * W).tobytes()
        else:
            new.graph.node[0].output[0] = "half"
            new.graph.node.append(helper.make_node("Add", ["half", "half"], ["y"]))
        return new

    monkeypatch.setattr(older.onnx.version_converter, "convert_version", wrong)
    said = {
        "another factor": "gives other outputs",
        "a tensor": "changes tensor 'w'",
        "an exception": "cannot convert it: no adapter",
    }
    with pytest.raises(torchopt.ModelError, match=rf"has opset 9, and .*{said[fault]}; export it again with opset 12 or newer"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_operators_that_are_written_out_as_functions_are_named(tmp_path):
    """Attention of opset 25 has no kernel yet; its outputs are at most the last bit apart, and the report says so."""
    q = helper.make_tensor_value_info("q", 1, [2, 3, 4, 8])
    constants = [
        numpy_helper.from_array(np.random.default_rng(n).choice(np.float32([0, 0.5, 1]), (2, 3, 6, 8)), f"k{n}") for n in (0, 1)
    ]
    nodes = [helper.make_node("Attention", ["q", "k0", "k1"], ["y"]), helper.make_node("Gelu", ["y"], ["z"])]
    graph = helper.make_graph(nodes, "g", [q], [helper.make_tensor_value_info("z", 1, None)], constants)
    for opset, named in ((25, ("Attention",)), (24, ())):
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11), tmp_path / "a.onnx")
        report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
        assert report.inlined == named
        assert ("outputs may differ in the last bit" in str(report)) == bool(named)
        x = np.random.default_rng(5).standard_normal((2, 3, 4, 8)).astype(np.float32)
        with contextlib.suppress(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
            a, b = (session(tmp_path / f"{name}.onnx").run(None, {"q": x})[0] for name in "ab")
            np.testing.assert_allclose(a, b, rtol=0, atol=2**-22 if named else 0)


@pytest.mark.parametrize(
    "kind", ["BFLOAT16", "FLOAT8E4M3FN", "INT2", "UINT2", "INT4", "FLOAT4E2M1", "STRING", "COMPLEX64", "BOOL", "INT64"]
)
def test_types_that_are_not_packed_stay_bit_for_bit(tmp_path, kind):
    """Typed, as bytes, and beside the file, between tensors that are packed."""
    dtype, rng = getattr(TensorProto, kind), np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if kind == "STRING":
        tensors = [helper.make_tensor(n, dtype, [600], [f"{i % 7}".encode() for i in range(600)]) for n in ("odd", "odder")]
    else:
        values = rng.integers(0, 2, 1201).astype(helper.tensor_dtype_to_np_dtype(dtype))
        tensors = [numpy_helper.from_array(values, "odd"), helper.make_tensor("odder", dtype, [1201], list(values))]
    graph_of(tmp_path / "a.onnx", nodes, [tensors[0], numpy_helper.from_array(W, "w"), tensors[1]])
    before = onnx.load(tmp_path / "a.onnx")
    if kind != "STRING":
        onnx.save(
            onnx.load(tmp_path / "a.onnx"), tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0
        )
    for source in ("a", "e")[: 1 + (kind != "STRING")]:
        report = pack(tmp_path / f"{source}.onnx", tmp_path / "b.onnx")
        assert [row.name for row in report.rows] == ["w"]
        unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
        back = onnx.load(tmp_path / "c.onnx")
        assert [t.name for t in back.graph.initializer] == ["odd", "w", "odder"]
        for one, other in zip(before.graph.initializer, back.graph.initializer, strict=True):
            assert (one.data_type, one.dims) == (other.data_type, other.dims)
            assert numpy_helper.to_array(one).tolist() == numpy_helper.to_array(other).tolist()


def test_external_data_at_odd_offsets_without_lengths_and_shared(tmp_path):
    """Two tensors over the same bytes, one behind the other without its length, one with a checksum that nobody reads."""
    path = tmp_path / "a.onnx"
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["x", "v"], ["b"])]
    graph_of(path, [*nodes, helper.make_node("Sub", ["a", "b"], ["y"])], [numpy_helper.from_array(W, n) for n in ("w", "v")])
    (tmp_path / "d.bin").write_bytes(b"abc" + W.tobytes() + W.tobytes() + b"more")
    model = onnx.load(path)
    for tensor, offset in zip(model.graph.initializer, (3, 3 + W.nbytes), strict=True):
        onnx.external_data_helper.set_external_data(tensor, "d.bin", offset, None if offset > 3 else W.nbytes, "0123")
        tensor.ClearField("raw_data")
    onnx.save(model, path)
    assert len(pack(path, tmp_path / "b.onnx").rows) == 2
    np.testing.assert_array_equal(run(tmp_path / "b.onnx"), run(path))


def test_a_name_that_is_used_again_within_is_left_alone(tmp_path):
    """ONNX Runtime takes an initializer under another's name in a branch, but not under that of what a node gives."""
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[3, 96] x, bool flag) => (float[3, 128] y)
        <float[1] w = {0}, float[1] v = {0}>
        {i = If (flag) <then_branch = t () => (p) <float[1] w = {0}> {p = MatMul (x, w)}, else_branch = e () => (s) {s = MatMul (x, v)}>
         m = MatMul (x, w)  n = MatMul (x, v)  y = Sum (m, n, i)}"""
    model = ir.to_proto(ir.from_onnx_text(text))
    then = next(a.g for n in model.graph.node for a in n.attribute if a.name == "then_branch")
    for number, tensor in enumerate([*model.graph.initializer, *then.initializer]):
        tensor.CopyFrom(numpy_helper.from_array(np.roll(W, number), tensor.name))
    onnx.save(model, tmp_path / "a.onnx")
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [row.name for row in report.rows] == ["v"]
    assert {entry.reason for entry in report.left} == {"of a name that is used again within or around its graph"}
    feed = {"x": np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)}
    for flag in (True, False):
        outputs = [session(tmp_path / f"{n}.onnx").run(None, feed | {"flag": np.array(flag)})[0] for n in "ab"]
        np.testing.assert_array_equal(*outputs)


def test_classifiers_that_give_maps_and_recurrent_layers_that_give_little(tmp_path):
    """What scikit-learn's converter writes ends in a sequence of maps; an LSTM leaves its first and last output out."""
    map_ = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    rng = np.random.default_rng(0)
    r = [rng.choice(np.float32([0, 0.5, 1]), (1, 64, n)) for n in (128, 16)]
    ml = {"domain": "ai.onnx.ml"}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Unsqueeze", ["h", "axes"], ["u"]),
        helper.make_node("LSTM", ["u", "r0", "r1"], ["", "last", ""], hidden_size=16),
        helper.make_node(
            "LinearClassifier",
            ["h"],
            ["label", "p"],
            coefficients=[0.1] * 256,
            intercepts=[0.0, 0.1],
            classlabels_ints=[0, 1],
            **ml,
        ),
        helper.make_node("ZipMap", ["p"], ["z"], classlabels_int64s=[0, 1], **ml),
    ]
    outputs = [helper.make_value_info("z", helper.make_sequence_type_proto(map_)), helper.make_tensor_value_info("last", 1, None)]
    constants = {"w": W, "axes": np.int64([0]), "r0": r[0], "r1": r[1]}
    x = helper.make_tensor_value_info("x", 1, [3, 96])
    graph = helper.make_graph(nodes, "g", [x], outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=8
    )
    onnx.save(model, tmp_path / "a.onnx")
    assert [row.name for row in pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows] == ["w", "r0", "r1"]
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert onnx.load(tmp_path / "c.onnx").graph.output == model.graph.output
    feed = {"x": rng.standard_normal((3, 96)).astype(np.float32)}
    maps, last = zip(*(session(tmp_path / f"{name}.onnx").run(None, feed) for name in "abc"), strict=True)
    assert maps[0] == maps[1] == maps[2]
    np.testing.assert_array_equal(last[0], last[1])


def test_the_browsers_unpacking_leaves_weights_in_branches_and_functions_to_the_runtime(tmp_path):
    documented(tmp_path / "a.onnx")
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    done = unpack_in_node(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert done.returncode == 0, done.stderr
    dense = onnx.load(tmp_path / "c.onnx")
    assert {t.name for t in dense.graph.initializer} >= {"w1", "w2", "k"}
    feed = {"x": np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)}
    for flag in (True, False):
        outputs = [session(tmp_path / f"{n}.onnx").run(None, feed | {"flag": np.array(flag)})[0] for n in "ac"]
        np.testing.assert_array_equal(*outputs)


def test_reshapes_and_casts_of_others_are_no_damage(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[3, 96] x) => (float[3, 128] y, string[6] t)
        <int64[2] same = {0, -1}, float[6] six = {1, 2, 3, 4, 5, 6}>
        {r = Reshape (w, same)  c = Cast <to = 1> (r)  y = MatMul (x, c)  t = Cast <to = 8> (six)}"""
    model = ir.to_proto(ir.from_onnx_text(text))
    model.graph.initializer.append(numpy_helper.from_array(weight(0.8, 16, np.int8), "w"))
    onnx.save(model, tmp_path / "a.onnx")
    values = decode_initializers(tmp_path / "a.onnx")
    np.testing.assert_array_equal(values["w"], weight(0.8, 16, np.int8))
    np.testing.assert_array_equal(values["six"], np.arange(1, 7, dtype=np.float32))
    assert [row.name for row in pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows] == ["w"]


@pytest.mark.parametrize("level", ["BASIC", "EXTENDED", "ALL"])
def test_files_that_onnx_runtime_has_optimized(tmp_path, level):
    rng = np.random.default_rng(0)
    constants = {
        n: rng.choice(rng.standard_normal(9).astype(np.float32), s) for n, s in (("a", (16, 3, 3, 3)), ("b", (16, 16, 3, 3)))
    }
    nodes = [helper.make_node("Conv", ["x", "a"], ["p"]), helper.make_node("Relu", ["p"], ["q"])]
    nodes += [helper.make_node("Conv", ["q", "b"], ["r"]), helper.make_node("Relu", ["r"], ["y"])]
    x, y = helper.make_tensor_value_info("x", 1, [1, 3, 8, 8]), helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "n.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "a.onnx")
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    onnxruntime.InferenceSession(tmp_path / "n.onnx", options, providers=["CPUExecutionProvider"])
    assert len(pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows) == 2
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    feed = {"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    outputs = [session(tmp_path / f"{name}.onnx").run(None, feed)[0] for name in "abc"]
    np.testing.assert_array_equal(outputs[1], outputs[0])
    np.testing.assert_array_equal(outputs[2], outputs[0])


def test_what_export_packs_is_decoded_and_compared_too(tmp_path, monkeypatch):
    import torch

    layer = torch.nn.Linear(96, 128)
    layer.weight.data = torch.tensor(W.T.copy())
    room = sys.modules["torchopt.export.export"]
    wrong = room.pack_model

    def spoiled(graph, **kwargs):
        report = wrong(graph, **kwargs)
        values = [v for v in graph.graph.initializers.values() if v.name.startswith("_") and v.dtype == ir.DataType.FLOAT]
        values[-1].const_value = ir.tensor(values[-1].const_value.numpy() * np.float32(1.5))
        return report

    monkeypatch.setattr(room, "pack_model", spoiled)
    with pytest.raises(torchopt.ModelError, match="differs|not equal"):
        export(layer, (torch.zeros(1, 96),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
