"""Files that say a thing twice, or oddly, or lie where links lead: what ONNX Runtime reads, or one sentence; and packing proves itself."""

import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_pack_onnx import graph_of, run, weight, write

import torchopt
from torchopt.export import decode_initializers, unpack
from torchopt.onnx_file import protobuf as wire
from torchopt.onnx_file import serialize
from torchopt.onnx_file.read import read
from torchopt.pack import pack

W = weight(0.8, 16)


def tensor_of(path):
    model = onnx.load(path, load_external_data=False)
    return model, model.graph.initializer[0]


def same_everywhere(path, tmp_path):
    """Packed and unpacked, ONNX Runtime gives what it gives for the file itself."""
    pack(path, tmp_path / "p.onnx")
    unpack(tmp_path / "p.onnx", tmp_path / "u.onnx")
    np.testing.assert_array_equal(run(tmp_path / "p.onnx"), run(path))
    np.testing.assert_array_equal(run(tmp_path / "u.onnx"), run(path))


@pytest.mark.parametrize("location", [None, TensorProto.DEFAULT, TensorProto.EXTERNAL])
@pytest.mark.parametrize("left_over", [False, True])
def test_where_a_tensor_says_that_its_data_lie(tmp_path, location, left_over):
    """Bytes in the message count unless it says EXTERNAL; then they do not, whatever they are."""
    path = tmp_path / "a.onnx"
    write(path, W)
    (tmp_path / "other.bin").write_bytes((2 * W).tobytes())
    model, tensor = tensor_of(path)
    if location is not None:
        tensor.data_location = location
    if left_over:
        tensor.external_data.add(key="location", value="other.bin")
    path.write_bytes(model.SerializeToString())
    if location == TensorProto.EXTERNAL and not left_over:
        with pytest.raises(torchopt.FileError, match="is no whole ONNX file"):
            pack(path, tmp_path / "p.onnx")
        return
    np.testing.assert_array_equal(decode_initializers(path)["w"], 2 * W if location == TensorProto.EXTERNAL else W)
    same_everywhere(path, tmp_path)


def test_external_data_read_by_onnx_and_saved_in_one_file(tmp_path):
    """What onnx.load and onnx.save make of a model with a second file says DEFAULT; in place, packing destroyed it."""
    path = tmp_path / "a.onnx"
    write(path, W)
    onnx.save(onnx.load(path), tmp_path / "b.onnx", save_as_external_data=True, size_threshold=0, location="b.bin")
    onnx.save(onnx.load(tmp_path / "b.onnx"), path)
    assert tensor_of(path)[1].HasField("data_location")
    before = run(path)
    pack(path, path)
    np.testing.assert_array_equal(run(path), before)
    np.testing.assert_array_equal(decode_initializers(path)["w"], W)


@pytest.mark.parametrize("form", ["no data", "no bytes", "cut", "too many", "numbers of another type", "no type"])
def test_a_shape_without_its_data_is_refused(tmp_path, form):
    path = tmp_path / "a.onnx"
    write(path, W)
    model, tensor = tensor_of(path)
    if form == "no type":
        tensor.data_type = 0
    elif form in ("no bytes", "cut", "too many"):
        tensor.raw_data = {"no bytes": b"", "cut": tensor.raw_data[:-4], "too many": tensor.raw_data + bytes(4)}[form]
    else:
        tensor.ClearField("raw_data")
        tensor.int64_data.extend([1] * (W.size if form == "numbers of another type" else 0))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(torchopt.FileError, match=r"is no whole ONNX file \(.*(elements|UNDEFINED)"):
        pack(path, tmp_path / "b.onnx")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.onnx"
    write(path, W)
    model, tensor = tensor_of(path)
    model.graph.initializer.append(numpy_helper.from_array(2 * W, "w"))
    onnx.save(model, path)
    for verb in (read, lambda p: pack(p, tmp_path / "b.onnx"), torchopt.report):
        with pytest.raises(torchopt.FileError, match="two of its tensors are called 'w'"):
            verb(path)


def hub(tmp_path):
    """A model and its data as a hub's cache holds them: links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "revision" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(tmp_path / "a.onnx", W)
    onnx.save(
        onnx.load(tmp_path / "a.onnx"), blobs / "m", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    os.rename(blobs / "model.onnx_data", blobs / "d")
    (snapshot / "model.onnx").symlink_to("../../../blobs/m")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/d")
    return snapshot / "model.onnx", blobs


def test_the_cache_of_a_model_hub(tmp_path):
    path, blobs = hub(tmp_path)
    np.testing.assert_array_equal(decode_initializers(path)["w"], W)
    pack(path, tmp_path / "p.onnx")
    np.testing.assert_array_equal(run(tmp_path / "p.onnx"), run(path))
    before = {p.name: p.read_bytes() for p in blobs.iterdir()}
    pack(path, path)  # the links are replaced, what they led to is as it was
    assert {p.name: p.read_bytes() for p in blobs.iterdir()} == before
    np.testing.assert_array_equal(run(path), run(tmp_path / "a.onnx"))


@pytest.mark.parametrize("escape", ["link", "folder above", "absolute", "through a folder"])
def test_data_outside_the_folder_stay_refused(tmp_path, escape):
    path, blobs = hub(tmp_path)
    (tmp_path / "real").mkdir()
    model = onnx.load(path, load_external_data=False)
    entry = next(e for e in model.graph.initializer[0].external_data if e.key == "location")
    if escape == "link":
        (tmp_path / "real" / "model.onnx_data").symlink_to(blobs / "d")
    else:
        entry.value = {"folder above": "../blobs/d", "absolute": str(blobs / "d"), "through a folder": "x/../../blobs/d"}[escape]
    (tmp_path / "real" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(torchopt.FileError, match="outside its folder"):
        read(tmp_path / "real" / "model.onnx")


def test_a_packed_byte_that_changes_on_the_way_is_seen(tmp_path, monkeypatch):
    """Each tensor of the packed file, one after the other, has one bit of one byte flipped before the proof reads it."""
    path = tmp_path / "a.onnx"
    write(path, weight(0.8, 16, np.int8))
    source, written = path.read_bytes(), serialize._write
    pack(path, tmp_path / "good.onnx")
    tensors = onnx.load(tmp_path / "good.onnx").graph.initializer
    assert [t.name for t in tensors] == ["s", "_0", "_1", "_2"]
    for tensor in tensors:

        def flipped(target, pieces, held, check, data=tensor.raw_data):
            def after(temporary):
                whole = bytearray(temporary.read_bytes())
                place = whole.find(data)
                assert place > 0
                whole[place] ^= 1
                temporary.write_bytes(whole)
                check(temporary)

            written(target, pieces, held, after)

        monkeypatch.setattr(serialize, "_write", flipped)
        for target in (path, tmp_path / "new.onnx"):
            with pytest.raises(
                torchopt.ModelError, match=r"^pack: .* would not be equal to its source: tensor '[ws]'.*nothing was wr"
            ):
                pack(path, target)
        assert path.read_bytes() == source
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "good.onnx"]


@pytest.mark.parametrize("change", ["a node", "an attribute", "a tensor", "an output", "a function's body", "a call's table"])
def test_anything_else_that_changes_on_the_way_is_seen(tmp_path, monkeypatch, change):
    text = """<ir_version: 10, opset_import: ["": 21, "theirs": 1]> g (float[3, 96] x) => (float[3, 128] y)
        {d = theirs.F (x, w)  e = Mul (d, s)  y = Clip (e)}
        <domain: "theirs", opset_import: ["": 21]> F (x, w) => (y) {y = Gemm <alpha = 2.0> (x, w)}"""
    model = ir.to_proto(ir.from_onnx_text(text))
    model.graph.initializer.extend([numpy_helper.from_array(W, "w"), numpy_helper.from_array(np.float32(2), "s")])
    onnx.save(model, tmp_path / "a.onnx")
    written = serialize._write

    def changed(target, pieces, held, check):
        def after(temporary):
            packed = onnx.load(temporary)
            theirs = next(f for f in packed.functions if f.domain == "theirs")
            if change == "a node":
                packed.graph.node[-1].op_type = "Identity"
            elif change == "an attribute":
                theirs.node[0].attribute[0].f = 3
            elif change == "a tensor":
                next(t for t in packed.graph.initializer if t.name == "s").raw_data = np.float32(3).tobytes()
            elif change == "an output":
                packed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 4
            elif change == "a function's body":
                theirs.node[0].input[0] = "w"
            else:
                packed.graph.node[0].input[-1] = packed.graph.node[0].input[0]
            onnx.save(packed, temporary)
            check(temporary)

        written(target, pieces, held, after)

    monkeypatch.setattr(serialize, "_write", changed)
    with pytest.raises(torchopt.ModelError, match="would not be equal to its source|cannot be read again"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_tensors_in_every_kind_of_attribute_come_back(tmp_path):
    """Lists of tensors, defaults of functions; each is large enough to be taken out of the message."""
    path = tmp_path / "a.onnx"
    nodes = [helper.make_node("Odd", ["x"], ["o"], domain="theirs"), helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph_of(path, nodes, [numpy_helper.from_array(W, "w")])
    model = onnx.load(path)
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="all", type=onnx.AttributeProto.TENSORS))
    model.graph.node[0].attribute[0].tensors.extend([numpy_helper.from_array(k * W, f"t{k}") for k in (1, 2, 3)])
    function = helper.make_function(
        "theirs", "Odd", ["x"], ["o"], [helper.make_node("Neg", ["x"], ["o"])], [helper.make_opsetid("", 21)]
    )
    function.attribute_proto.append(helper.make_attribute("default", numpy_helper.from_array(5 * W, "five")))
    model.functions.append(function)
    model.opset_import.add(domain="theirs", version=1)
    onnx.save(model, path)
    pack(path, tmp_path / "b.onnx")
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    for name in "bc":
        back = onnx.load(tmp_path / f"{name}.onnx")
        odd = next(node for node in back.graph.node if node.op_type == "Odd")
        assert odd == model.graph.node[0]
        assert next(f for f in back.functions if f.domain == "theirs") == function


def field(number: int, kind: int, value: bytes = b"") -> bytes:
    return wire._as_varint(number << 3 | kind) + value


def bytes_field(number: int, value: bytes) -> bytes:
    return wire.head(number, len(value)) + value


ODD = {
    "the last of two fields counts": lambda raw: bytes_field(9, bytes(len(raw))) + bytes_field(9, raw),
    "a small one after a large one": lambda raw: bytes_field(9, raw) + bytes_field(9, b"") + bytes_field(9, raw),
    "an unknown group": lambda raw: (
        field(99, 3) + field(98, 3) + field(98, 4) + field(3, 0, b"\x01") + field(99, 4) + bytes_field(9, raw)
    ),
    "unknown fields": lambda raw: field(90, 5, b"1234") + bytes_field(9, raw) + field(91, 1, b"12345678") + bytes_field(92, raw),
    "raw_data as a number": lambda raw: bytes_field(9, raw) + field(9, 0, b"\x05"),
    "data_location twice": lambda raw: field(14, 0, b"\x01") + field(14, 0, b"\x00") + bytes_field(9, raw),
    "a long varint": lambda raw: field(14, 0, b"\x80\x80\x80\x80\x00") + bytes_field(9, raw),
}


@pytest.mark.parametrize("form", ODD)
def test_messages_that_protobuf_reads_otherwise_than_they_look(form):
    raw = W.tobytes()
    dims = bytes_field(1, b"\x60\x80\x01")  # packed: 96, 128
    tensor = dims + field(2, 0, b"\x01") + ODD[form](raw) + bytes_field(8, b"w")
    model = field(1, 0, b"\x0a") + bytes_field(7, bytes_field(5, tensor))
    assert numpy_helper.to_array(onnx.ModelProto.FromString(model).graph.initializer[0]).tobytes() == raw
    outlined = onnx.ModelProto.FromString(wire.without_data(model)).graph.initializer[0]
    where = {entry.key: entry.value for entry in outlined.external_data}
    assert (where["location"], outlined.data_location) == (wire.HERE, TensorProto.EXTERNAL)
    start = int(where["offset"])
    assert model[start : start + int(where["length"])] == raw


@pytest.mark.parametrize("twice", ["graph", "attribute"])
def test_messages_that_stand_twice_are_merged_as_protobuf_does(twice):
    tensor = bytes_field(1, b"\x60\x80\x01") + field(2, 0, b"\x01") + bytes_field(9, W.tobytes())
    if twice == "graph":
        model = bytes_field(7, bytes_field(5, tensor)) + bytes_field(7, bytes_field(5, tensor))
    else:
        attribute = bytes_field(5, tensor) + bytes_field(5, bytes_field(9, (2 * W).tobytes()))
        model = bytes_field(7, bytes_field(1, bytes_field(5, attribute)))
    assert onnx.ModelProto.FromString(wire.without_data(model)) == onnx.ModelProto.FromString(model)


@pytest.mark.parametrize(
    "message", [field(9, 3), field(9, 4), field(9, 3) + field(8, 4), field(9, 7), field(0, 0, b"\x01"), b"\xff" * 11]
)
def test_messages_that_are_damaged_are_refused(message):
    with pytest.raises(ValueError, match="at byte|within a|damaged"):
        wire.without_data(message)


def test_the_format_of_onnx_runtime_is_named(tmp_path):
    path = tmp_path / "a.ort"
    path.write_bytes(b"\x1c\x00\x00\x00ORTM" + bytes(100))
    for verb in (pack, unpack):
        with pytest.raises(
            torchopt.FileError, match=r"ONNX Runtime's own format, \.ort: give the \.onnx file that it was made from"
        ):
            verb(path, tmp_path / "b.onnx")


@pytest.mark.parametrize("imports", [["ai.onnx"], ["ai.onnx.ml"]])
def test_files_that_import_one_operator_set_by_its_long_name(tmp_path, imports):
    path = tmp_path / "a.onnx"
    if imports == ["ai.onnx"]:
        write(path, W)
        model = onnx.load(path)
        model.opset_import[0].domain = "ai.onnx"
    else:
        node = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.5] * 96, scale=[2.0] * 96)
        graph_of(path, [node], [])
        model = onnx.load(path)
        model.opset_import[0].CopyFrom(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, path)
    report = pack(path, tmp_path / "b.onnx")
    assert len(report.rows) == (imports == ["ai.onnx"])
    np.testing.assert_array_equal(run(tmp_path / "b.onnx"), run(path))
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert onnx.load(tmp_path / "c.onnx") == model


def test_a_tensor_without_elements(tmp_path):
    path = tmp_path / "a.onnx"
    nodes = [helper.make_node("Concat", ["w", "none"], ["v"], axis=0), helper.make_node("MatMul", ["x", "v"], ["y"])]
    graph_of(path, nodes, [numpy_helper.from_array(W, "w"), numpy_helper.from_array(np.zeros((0, 128), np.float32), "none")])
    same_everywhere(path, tmp_path)
    assert decode_initializers(path)["none"].shape == (0, 128)
    assert [row.name for row in torchopt.report(path).rows][:1] == ["w"]
