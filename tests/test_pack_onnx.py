"""Packed ONNX files: bit-equal outputs, decoded once at load, unpacked to the same tensors, and never a crash."""

import collections
import contextlib
import resource
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import torchopt
from torchopt.export.pack import decode_initializers, pack, unpack
from torchopt.runtime import inspect

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


EVERY = {  # kind: (sparsity, values, shape)
    **{f"t{width}": (0, n, (96, 128)) for width, n in {1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 64, 7: 100, 8: 200}.items()},
    **{f"ut{width}": (0, n, (91, 131)) for width, n in {1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 64, 7: 100}.items()},
    "mt3": (0.5, 8, (96, 128)),
    "mt4": (0.5, 16, (96, 128)),
    "mT4": (0.5, 17, (96, 128)),
    "umt5": (0.5, 20, (91, 131)),
    "mr": (0.5, 10_000, (96, 128)),
    "g3t4": (0.8, 16, (96, 128)),
    "g3T4": (0.8, 17, (96, 128)),
    "g4t6": (0.9, 40, (96, 128)),
    "g5r": (0.93, 10_000, (96, 128)),
    "g6o": (0.96, 2, (91, 131)),
    "g8t2": (0.99, 4, (96, 128)),
}
BELLS = {"t7p5": (12, 30, (96, 2000)), "ut6p5p8": (3, 12, (91, 2001))}  # kind: (degrees of freedom, width, shape)


def every(kind: str) -> np.ndarray:
    """A weight that is packed as this kind: equally frequent values at random places, a bell of bytes, or a few values a row."""
    rng = np.random.default_rng(1)
    if kind in BELLS:
        degrees, width, shape = BELLS[kind]
        return np.round(rng.standard_t(degrees, shape) * width).clip(-128, 127).astype(np.int8)
    if "c" in kind:
        rows = 63 if kind[0] == "u" else 64  # in groups of 16 for "mc", which then share a table
        codes = rng.integers(0, 2 ** int(kind[-1]) - (kind[0] != "c"), (rows, 401))
        kept = rng.random(codes.shape) >= {"c": 0, "g": 0.8}.get(kind[0], 0.5)
        group = 16 if kind.startswith("mc") else 1
        return (kept * (codes + 1) * rng.random((rows // group, 1)).repeat(group, axis=0)).astype(np.float32)
    sparsity, values, shape = EVERY[kind]
    w = rng.choice(rng.standard_normal(values - (sparsity > 0)), size=shape).astype(np.float32)
    w[rng.random(shape) < sparsity] = 0
    return w


# UINT4, of opset 21, may end at any size
CHANNELS = ("c2", "c4", "mc4", "mc3", "g3c4", "umc5")
KINDS_AND_OPSETS = [
    (kind, opset) for kind in (*EVERY, *BELLS, *CHANNELS) for opset in (12, 18, 21) if opset > 12 or kind not in BELLS
]


@pytest.mark.parametrize(("kind", "opset"), [case for case in KINDS_AND_OPSETS if case != ("ut4", 21)])
def test_every_kind_is_decoded_at_load_to_the_same_bits(tmp_path, kind, opset):
    w = every(kind)
    write(tmp_path / "a.onnx", w, opset)
    pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    packed = onnx.load(tmp_path / "b.onnx")
    onnx.checker.check_model(packed)
    calls = [node.op_type for node in packed.graph.node if node.domain == "torchopt"]
    assert calls == [kind]
    np.testing.assert_array_equal(run(tmp_path / "b.onnx", tmp_path / "o.onnx"), run(tmp_path / "a.onnx"))
    kernels = {node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node}
    assert kernels <= {"MatMul", "DequantizeLinear", "MatMulNBits"}, kernels
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    back = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "c.onnx").graph.initializer}
    np.testing.assert_array_equal(back["w"].view(np.uint8), w.view(np.uint8))


def run(path, optimized=None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized:
        options.optimized_model_filepath = str(optimized)
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, opened.get_inputs()[0].shape[1])).astype(np.float32)
    return opened.run(None, {"x": x})[0]


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


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8"])
@pytest.mark.parametrize("kind", ["t4", "mt4", "mT4", "g3t4", "g6o", "mc4"])
def test_P7_every_type_of_weights(tmp_path, kind, dtype):
    w = every(kind) * 40 if dtype in ("int32", "uint8") else every(kind)
    w = w.astype(helper.tensor_dtype_to_np_dtype(getattr(TensorProto, {"float64": "DOUBLE"}.get(dtype, dtype.upper()))))
    nodes = [helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), helper.make_node("MatMul", ["x", "f"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", w.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", w.shape[1]])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(w, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "a.onnx")
    assert len(pack(tmp_path / "a.onnx", tmp_path / "b.onnx").rows) == 1
    np.testing.assert_array_equal(run(tmp_path / "b.onnx", tmp_path / "o.onnx"), run(tmp_path / "a.onnx"))
    assert {node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node} <= {"MatMul", "Cast"}
    unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")
    back = numpy_helper.to_array(onnx.load(tmp_path / "c.onnx").graph.initializer[0])
    assert (back.dtype, back.tobytes()) == (w.dtype, w.tobytes())


@pytest.mark.parametrize("opset", [11, 30])
def test_opsets_that_cannot_decode_are_refused(tmp_path, opset):
    write(tmp_path / "a.onnx", weight(0.8, 16), opset=opset)
    with pytest.raises(torchopt.ModelError, match=f"pack: the model has opset {opset}; convert it to one of 12 to [0-9]+"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_P7_what_stays_dense_and_why(tmp_path):
    """One weight of each reason; a large Constant node is packed like an initializer."""
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
    assert [row.name for row in report.rows] == ["constant"]
    assert {entry.name: entry.reason for entry in report.left} == {
        "inner": "inside a subgraph or a function",
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


def test_weights_that_are_inputs_or_outputs_or_in_a_branch_are_left_alone(tmp_path):
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
    assert [row.name for row in report.rows] == ["outer"]
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


@pytest.mark.parametrize(("kind", "most"), [("t4", 80), ("t5", 100), ("umt5", 120), ("g3t4", 110), ("g6o", 90), ("c2", 90)])
def test_P7_each_further_tensor_costs_at_most_150_bytes(tmp_path, kind, most):
    def size(count: int) -> int:
        rng, names = np.random.default_rng(0), [f"w{i}" for i in range(count)]
        nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in names]
        nodes.append(helper.make_node("Sum", [f"y{name}" for name in names], ["y"]))
        shuffled = rng.permutation if kind[0] == "c" else lambda w: rng.permutation(w.reshape(-1)).reshape(w.shape)
        weights = [numpy_helper.from_array(shuffled(every(kind)) * np.float32(i + 1), name) for i, name in enumerate(names)]
        graph_of(tmp_path / "a.onnx", nodes, weights)
        report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
        assert len(report.rows) == count
        own = sum(len(n.SerializeToString()) + 2 for n in nodes)
        return (tmp_path / "b.onnx").stat().st_size - report.packed_bytes - own

    assert size(2) - size(1) <= most <= 150
    assert size(1) <= 2_500


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


def test_a_decoder_without_an_output_is_refused(tmp_path):
    damaged(tmp_path, lambda node: node.output.pop())
    with pytest.raises(torchopt.FileError, match=r"is damaged \(0 outputs\)"):
        unpack(tmp_path / "b.onnx", tmp_path / "c.onnx")


def test_more_than_two_gigabytes_is_refused_and_the_old_file_stays(tmp_path, monkeypatch):
    write(tmp_path / "a.onnx", weight(0.8, 16))
    (tmp_path / "b.onnx").write_bytes(b"old")

    class TooLarge:
        def SerializeToString(self):
            raise ValueError("Message exceeds maximum protobuf size of 2GB")

    monkeypatch.setattr("onnx_ir.to_proto", lambda model: TooLarge())
    with pytest.raises(torchopt.ModelError, match="protobuf holds at most 2 GB"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "a.onnx", weight(0.8, 16))
    (tmp_path / "b.onnx").write_bytes(b"old")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(torchopt.FileError, match=r"b\.onnx: cannot be written \(No space left on device\)"):
        pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    assert (tmp_path / "b.onnx").read_bytes() == b"old"
