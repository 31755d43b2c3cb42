"""Every kind of packed tensor, in every operator set and type: decoded at load, to the same bits, in few bytes."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_pack_onnx import graph_of, run, write

from torchopt.export import unpack
from torchopt.pack import pack

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


# UINT4, of opset 21, may end at any size
CHANNELS = ("c2", "c4", "mc4", "mc3", "g3c4", "umc5")


KINDS_AND_OPSETS = [
    (kind, opset) for kind in (*EVERY, *BELLS, *CHANNELS) for opset in (12, 18, 21) if opset > 12 or kind not in BELLS
]


@pytest.fixture(autouse=True)
def _best_gaps_only(monkeypatch):
    """Each kind is wanted here, also where a small file has a smaller one in gaps of four bits, whose functions are fewer."""
    monkeypatch.setattr(sys.modules["torchopt.codecs.encode"], "PAIRED_AT_MOST", 0)


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


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int32", "uint8"])
@pytest.mark.parametrize("kind", ["t4", "mt4", "mT4", "g3t4", "g6o", "mc4"])
def test_P7_every_type_of_weights(tmp_path, kind, dtype):
    w = every(kind) * 40 if dtype in ("int8", "int32", "uint8") else every(kind)
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
