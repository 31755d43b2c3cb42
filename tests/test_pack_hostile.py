"""Files that are damaged, hostile or too large, and disks that are full: one sentence, no harm, the old file or the new one."""

import contextlib
import resource
import subprocess
import sys
import time
import unittest.mock

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_pack_kinds import every
from test_pack_onnx import run, weight, write

import torchopt
from torchopt.cli.commands import status
from torchopt.export import decode_initializers, export, to_ort, unpack
from torchopt.onnx_file.read import read
from torchopt.onnx_file.serialize import serialized
from torchopt.pack import pack
from torchopt.pack.in_place import pack_model
from torchopt.runtime import inspect


def mutated(data: bytes, seed: int) -> bytes:
    """The file cut, replaced by noise, with a few bytes changed, with a piece missing, or with a packed weight that lies."""
    rng = np.random.default_rng(seed)
    kind, broken = seed % 5, bytearray(data)
    if kind == 0:
        return bytes(broken[: rng.integers(0, len(data))])
    if kind == 1:
        return rng.bytes(int(rng.integers(0, 2000)))
    if kind == 4:
        return twisted(data, rng)
    for _ in range(int(rng.integers(1, 40))):
        broken[rng.integers(0, len(broken))] = rng.integers(0, 256)
    if kind == 3:
        start = int(rng.integers(0, len(broken)))
        del broken[start : start + int(rng.integers(1, 200))]
    return bytes(broken)


def twisted(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one thing changed that the decoder of a weight relies on."""
    model = onnx.load_model_from_string(data)
    node, tensor = model.graph.node[0], model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
    which = int(rng.integers(8))
    if which < 2 and node.attribute:
        attribute = node.attribute[int(rng.integers(len(node.attribute)))]
        attribute.ints[:] = [int(n) for n in rng.choice([-1, 0, 1, 7, 96, 1 << 20, 1 << 40, (1 << 63) - 1], rng.integers(0, 4))]
    elif which == 2:
        node.op_type = str(
            rng.choice(["t1", "t8", "mt4", "umt4", "g3t4", "g9t4", "c4", "mr", "o", "t5p2p8", "mT8", "", "x", "H0", "H4g5", "v"])
        )
    elif which == 3:
        node.input[:] = [str(name) for name in rng.permutation(list(node.input))[: rng.integers(0, 9)]]
    elif which == 4:
        tensor.dims[:] = [int(n) for n in rng.choice([-1, 0, 1, 2, 7, 96, 1 << 40], rng.integers(0, 4))]
    elif which == 5:
        tensor.data_type = int(rng.integers(0, 30))
    elif which == 6:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(0, len(tensor.raw_data) + 1))]
    else:
        del model.graph.initializer[:]
    return model.SerializeToString()


def shared(tmp_path, zeros: float) -> bytes:
    """A packed file of two weights that are cut out of one stream of Huffman codes, whatever that takes."""
    rng = np.random.default_rng(0)
    values = np.minimum(rng.geometric(0.35, (2, 64, 128)), 14).astype(np.float32) / 8
    values[rng.random(values.shape) < zeros] = 0
    weights = [numpy_helper.from_array(value, f"w{i}") for i, value in enumerate(values)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(2)]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names] for names in (["x"], ["y0", "y1"])]
    graph = helper.make_graph(nodes, "g", *ends, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "b.onnx")
    model = read(tmp_path / "b.onnx")
    with unittest.mock.patch.object(sys.modules["torchopt.pack.together"], "function_bytes_of", return_value={}):
        assert "huffman" in str(pack_model(model, smallest=True))
    return serialized(model, "fuzz")


def fuzz(tmp_path, count: int) -> None:
    sources = []
    for kind in ("g3t4", "mT4", "c4", "mc4", "ut6p5p8"):
        write(tmp_path / "a.onnx", every(kind)[:, : 2001 if kind[0] == "u" else 128])
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
        sources.append((tmp_path / "b.onnx").read_bytes())
    sources.append((tmp_path / "a.onnx").read_bytes())
    sources += [shared(tmp_path, zeros) for zeros in (0.0, 0.8)]
    (tmp_path / "out.onnx").write_bytes(b"old")
    for seed in range(count):
        (tmp_path / "m.onnx").write_bytes(mutated(sources[seed % len(sources)], seed // len(sources)))
        for verb in (pack, unpack):
            try:
                verb(tmp_path / "m.onnx", tmp_path / "out.onnx")
                (tmp_path / "out.onnx").write_bytes(b"old")
            except torchopt.TorchoptError:
                assert (tmp_path / "out.onnx").read_bytes() == b"old"
        for reader in (decode_initializers, inspect):
            with contextlib.suppress(torchopt.TorchoptError):
                reader(tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "m.onnx", "out.onnx"]


def test_mutated_files_do_no_harm(tmp_path, capfd):
    fuzz(tmp_path, 200)
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_P7_5000_mutated_files_do_no_harm_and_take_no_memory(tmp_path, capfd):
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    fuzz(tmp_path, 5000)
    assert time.monotonic() - started < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 300_000  # kilobytes; a file is 8 kB
    assert capfd.readouterr().out == ""


def test_external_data_is_read_and_a_way_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path / "a.onnx", weight(0.8, 16))
    onnx.save(onnx.load(tmp_path / "a.onnx"), tmp_path / "e.onnx", save_as_external_data=True, location="e.bin", size_threshold=0)
    pack(tmp_path / "e.onnx", tmp_path / "b.onnx")
    np.testing.assert_array_equal(decode_initializers(tmp_path / "b.onnx")["w"], weight(0.8, 16))
    model = onnx.load(tmp_path / "e.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret.bin"
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes((tmp_path / "e.bin").read_bytes())
    (tmp_path / "inside" / "e.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "e.bin").unlink()
    for source in (tmp_path / "e.onnx", tmp_path / "inside" / "e.onnx"):
        with pytest.raises(torchopt.FileError, match="is no whole ONNX file"):
            pack(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def damaged(tmp_path, change) -> None:
    write(tmp_path / "a.onnx", weight(0.9, 16))
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    model = onnx.load(tmp_path / "b.onnx")
    change(next(node for node in model.graph.node if node.domain == "torchopt"))
    onnx.save(model, tmp_path / "b.onnx")


def test_a_small_file_cannot_claim_a_huge_tensor(tmp_path):
    def huge(node):
        for attribute in node.attribute:
            if attribute.name in "dn":
                attribute.ints[:] = [1 << 40]

    damaged(tmp_path, huge)
    with pytest.raises(
        torchopt.FileError, match=r"the packed weight w is damaged \(the gaps span \d+ elements, the tensor has 1099511627776\)"
    ):
        unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.output.pop(), r"is no whole ONNX file \(a node reads 'w', which nothing gives\)"),
        (lambda node: node.output.append("v"), r"the packed weight of node '' is damaged \(2 outputs\)"),
        (lambda node: setattr(node, "op_type", "g3t9"), r"the packed weight w is damaged \(kind 'g3t9'\)"),
        (lambda node: node.input.pop(), r"the packed weight w is damaged \("),
    ],
)
def test_calls_that_are_none_are_refused(tmp_path, change, message):
    damaged(tmp_path, change)
    with pytest.raises(torchopt.FileError, match=message):
        unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")


def test_four_bit_tensors_that_claim_more_than_they_hold_are_refused(tmp_path):
    write(tmp_path / "a.onnx", every("t4"))
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    model = onnx.load(tmp_path / "b.onnx")
    next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT4).dims[:] = [1 << 34]
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(torchopt.FileError, match="tensor '_0' has 6144 bytes for 17179869184 elements"):
        unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")


def test_P7_more_than_two_gigabytes_go_to_a_second_file(tmp_path, monkeypatch):
    write(tmp_path / "a.onnx", weight(0.8, 16))
    pack(tmp_path / "a.onnx", tmp_path / "p.onnx")
    monkeypatch.setattr(sys.modules["torchopt.onnx_file.serialize"], "LIMIT", 20_000)
    for again in range(3):  # the second file of the file that is replaced goes away when the new pair stands
        unpack(tmp_path / "p.onnx", tmp_path / "b.onnx")
        second = "b.onnx.data" if again != 1 else "b.onnx.1.data"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", second, "p.onnx"]
        assert (tmp_path / second).stat().st_size == 49_152
        np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))
    pack(tmp_path / "b.onnx", tmp_path / "c.onnx")  # its data came from a second file, so they go to one
    assert (tmp_path / "c.onnx.data").stat().st_size < 12_288
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "c.onnx"))
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")  # 49,152 bytes before, fewer than 20,000 after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "c.onnx", "c.onnx.data", "p.onnx"]
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


def test_P7_an_export_of_more_than_two_gigabytes_is_refused(tmp_path, monkeypatch):
    (tmp_path / "b.onnx").write_bytes(b"old")
    monkeypatch.setattr(sys.modules["torchopt.onnx_file.serialize"], "LIMIT", 20_000)
    with pytest.raises(
        torchopt.ModelError, match="export: it takes 0.00 GB, and one ONNX file holds 2 GB at most; split the model"
    ):
        export(torch.nn.Linear(128, 256), (torch.zeros(1, 128),), tmp_path / "b.onnx", pack=False)
    assert (tmp_path / "b.onnx").read_bytes() == b"old"


def test_a_weight_that_proves_damaged_while_a_second_file_is_written_leaves_the_old_files(tmp_path):
    """Its claim of 4 TB goes to a second file, of which nothing stays."""

    def huge(node):
        next(a for a in node.attribute if a.name == "d").ints[:] = [1 << 40]

    damaged(tmp_path, huge)
    (tmp_path / "c.onnx").write_bytes(b"old")
    with pytest.raises(torchopt.FileError, match="the packed weight w is damaged"):
        unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "c.onnx"]
    assert (tmp_path / "c.onnx").read_bytes() == b"old"


def test_what_protobuf_cannot_write_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.onnx", weight(0.8, 16))

    def refused(model):
        raise ValueError("Message exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr("onnx_ir.to_proto", refused)
    with pytest.raises(
        torchopt.ModelError, match="cannot be written as one ONNX file: Message exceeds maximum protobuf size of 2GB"
    ):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.fixture
def little_disk(tmp_path):
    """A folder on a disk of 64 kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("verb", ["pack", "unpack", "export", "to_ort"])
def test_P7_a_full_disk_leaves_the_old_file(tmp_path, little_disk, verb, capfd):
    write(tmp_path / "a.onnx", np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32))
    target = little_disk / ("m.ort" if verb == "to_ort" else "m.onnx")
    target.write_bytes(b"old")
    verbs = {"pack": pack, "unpack": unpack, "to_ort": to_ort}
    verbs["export"] = lambda _, path: export(torch.nn.Linear(128, 256), (torch.zeros(1, 128),), path)
    with pytest.raises(torchopt.FileError, match=rf"{target.name}: cannot be written \(No space left on device\); free space or"):
        verbs[verb](tmp_path / "a.onnx", target)
    assert [p.name for p in little_disk.iterdir()] == [target.name]
    assert target.read_bytes() == b"old"
    assert status(["pack", str(tmp_path / "a.onnx"), str(little_disk / "n.onnx")]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("command", ["pack", "unpack", "inspect", "bench"])
@pytest.mark.parametrize("damage", ["cut", "random", "empty", "missing", "folder", "no data", "data elsewhere", "new opset"])
def test_P7_bad_files_exit_with_2_and_one_line(tmp_path, capfd, command, damage):
    path, rng = tmp_path / "m.onnx", np.random.default_rng(0)
    write(path, weight(0.8, 16), opset=30 if damage == "new opset" else 21)
    if damage in ("no data", "data elsewhere"):
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.bin", size_threshold=0)
        (tmp_path / "m.bin").unlink()
        model = onnx.load(path, load_external_data=False)
        if damage == "data elsewhere":
            next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "/etc/hostname"
            path.write_bytes(model.SerializeToString())
    elif damage in ("cut", "random", "empty"):
        path.write_bytes({"cut": path.read_bytes()[:20_000], "random": rng.bytes(5_000), "empty": b""}[damage])
    elif damage != "new opset":
        path.unlink()
        if damage == "folder":
            path.mkdir()
    target = [str(tmp_path / "out.onnx")] if command in ("pack", "unpack") else []
    code = status([command, str(path), *target])
    if (command, damage) == ("unpack", "new opset"):
        assert code == 0  # nothing is packed, so nothing has to be understood
        return
    error = capfd.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(
        f"torchopt: {path}" if (command, damage) != ("pack", "new opset") else "torchopt: pack: the model has"
    )
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("shape", [(91, 2), (7,)])
def test_scales_that_do_not_fit_their_weight_are_refused(tmp_path, shape):
    write(tmp_path / "a.onnx", weight(0.8, 16, np.int8))
    model = onnx.load(tmp_path / "a.onnx")
    next(t for t in model.graph.initializer if t.name == "s").CopyFrom(
        onnx.numpy_helper.from_array(np.ones(shape, np.float32), "s")
    )
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(torchopt.FileError, match=r"a\.onnx: a weight or its scale is damaged \("):
        decode_initializers(tmp_path / "a.onnx")
