"""Huffman codes in stock operators: near the entropy, decoded alike by ONNX Runtime, numpy and JavaScript, never larger than packing."""

import gzip
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from torchopt.codecs.huffman import LANE, compress, decompress, lengths
from torchopt.codecs.joined import apart, join
from torchopt.errors import FileError
from torchopt.pack import pack, unpack
from torchopt.pack.proof import prove
from torchopt.runtime import inspect
from torchopt.web import UNPACK


def entropy(*arrays: np.ndarray) -> float:
    """Bytes of the order-0 entropy of each array's values."""
    counts = [np.unique(a, return_counts=True)[1] for a in arrays]
    return sum(float(-(c * np.log2(c / c.sum())).sum()) / 8 for c in counts)


def bell(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> np.ndarray:
    return np.clip(np.round(rng.standard_normal(shape) * width), -127, 127).astype(np.int8)


def sparse(rng: np.random.Generator, shape: tuple[int, ...], zeros: float = 0.8) -> np.ndarray:
    """Fifteen values, and zeros, as after training with masks and tables."""
    values = np.sort(rng.permutation(np.r_[-127:0, 1:128])[:15]).astype(np.int8)
    w = values[np.clip(np.round(rng.standard_normal(shape) * 3 + 7), 0, 14).astype(int)]
    w[rng.random(shape) < zeros] = 0
    return w


def file_of(path: Path, weights: list[np.ndarray], opset: int = 21) -> Path:
    """A file that multiplies its input by each weight."""
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    nodes = [helper.make_node("Cast", [f"w{i}"], [f"c{i}"], to=TensorProto.FLOAT) for i in range(len(weights))]
    nodes += [helper.make_node("Mul", [f"c{i}", "x"], [f"y{i}"]) for i in range(len(weights))]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(len(weights))]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "bell": [bell(rng, (64, n), 5.0) for n in (27, 288, 576, 1152, 1152)],
        "sparse": [sparse(rng, (64, n)) for n in (27, 576, 577, 576, 1152)],
        "both": [bell(rng, (64, 1152), 4.0), sparse(rng, (64, 2304)), sparse(rng, (10, 64), 0.0), sparse(rng, (64, 1001), 0.9)],
        "sixteen float": [
            sparse(rng, (64, 600), 0.05).astype(np.float32) / 64,
            sparse(rng, (64, 900), 0.05).astype(np.float32) / 77,
        ],
    }


def test_lengths_are_those_of_an_optimal_code_within_eight_bits():
    """Kraft's sum is one, and a code of Fibonacci counts, whose unbounded one has twelve bits, has eight."""
    counts = np.array([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233])
    found = lengths(counts)
    assert found.max() == 8
    assert sum(0.5 ** int(n) for n in found) == 1.0
    assert lengths(np.array([50, 0, 25, 15, 10])).tolist() == [1, 0, 2, 3, 3]


@pytest.mark.parametrize("count", [2, 3, LANE - 1, LANE, LANE + 1, 20 * LANE + 7])
def test_a_stream_gives_its_symbols_back(count):
    symbols = np.minimum(np.random.default_rng(count).geometric(0.4, count), 20).astype(np.uint8)
    symbols[:2] = 1, 2
    stream = compress(symbols)
    np.testing.assert_array_equal(decompress(stream), symbols)


def test_a_stream_is_within_two_percent_of_the_entropy():
    """Of 200,000 symbols of 16 kinds, lanes and code included."""
    p = 0.5 ** (np.arange(16) * 0.45)
    symbols = np.random.default_rng(0).choice(16, 200_000, p=p / p.sum()).astype(np.uint8)
    assert compress(symbols).payload_bytes < 1.02 * entropy(symbols)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.8, 0.95])
def test_codes_go_apart_again(zeros):
    codes = np.abs(bell(np.random.default_rng(1), (30_000,), 12.0)).astype(np.uint8)
    codes[np.random.default_rng(2).random(codes.shape) < zeros] = 0
    joined = join(codes)
    np.testing.assert_array_equal(apart(joined), codes)
    assert joined.payload_bytes < 1.04 * entropy(codes) + 120


@pytest.mark.parametrize("kind", ["bell", "sparse", "both", "sixteen float"])
def test_smallest_is_smaller_and_equal(kind, weights, tmp_path):
    """Smaller than packing and than gzip; ONNX Runtime decodes it to the same bits at load, and so does unpacking."""
    source = file_of(tmp_path / "a.onnx", weights[kind])
    pack(source, tmp_path / "default.onnx")
    report = pack(source, tmp_path / "smallest.onnx", smallest=True)
    default, smallest = ((tmp_path / f"{name}.onnx").stat().st_size for name in ("default", "smallest"))
    assert smallest < default
    assert smallest < len(gzip.compress(source.read_bytes(), 9))
    assert report.packed_bytes < 1.05 * entropy(*weights[kind]) + 400
    assert any("huffman" in row.codec for row in report.rows)
    assert inspect(tmp_path / "smallest.onnx").undecoded == []
    unpack(tmp_path / "smallest.onnx", tmp_path / "back.onnx")
    prove(source, tmp_path / "back.onnx", "test")
    x = np.array([1.5], np.float32)
    one, other = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for path in (source, tmp_path / "smallest.onnx")
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_smallest_is_what_packing_gives_where_decoders_would_cost_more(tmp_path):
    """One tensor of 2,000 weights: three kilobytes of decoders do not pay."""
    source = file_of(tmp_path / "a.onnx", [bell(np.random.default_rng(0), (2000,), 3.0)])
    pack(source, tmp_path / "default.onnx")
    pack(source, tmp_path / "smallest.onnx", smallest=True)
    assert (tmp_path / "smallest.onnx").read_bytes() == (tmp_path / "default.onnx").read_bytes()


def test_opsets_without_bitwise_operators_are_packed_by_default(weights, tmp_path):
    source = file_of(tmp_path / "a.onnx", weights["sparse"], opset=17)
    report = pack(source, tmp_path / "smallest.onnx", smallest=True)
    assert not any("huffman" in row.codec for row in report.rows)


def test_tensors_of_one_form_share_a_stream(tmp_path):
    """Sixty tensors of 1,000 integers, whose common codes take less than calls of their own; default packing, no Huffman codes."""
    rng = np.random.default_rng(0)
    source = file_of(tmp_path / "a.onnx", [bell(rng, (10, 100), 12.0) for _ in range(60)])
    report = pack(source, tmp_path / "b.onnx")
    assert {row.codec.split()[0] for row in report.rows} == {"together"}
    assert (tmp_path / "b.onnx").stat().st_size < source.stat().st_size
    unpack(tmp_path / "b.onnx", tmp_path / "back.onnx")
    prove(source, tmp_path / "back.onnx", "test")


def test_a_damaged_stream_is_named_by_tensor(weights, tmp_path):
    """Each part of a call changed or cut: unpacking names the weight, or gives the source's shape."""
    pack(file_of(tmp_path / "a.onnx", weights["both"]), tmp_path / "b.onnx", smallest=True)
    good = onnx.load(tmp_path / "b.onnx")
    call = next(n for n in good.graph.node if n.op_type.startswith("H"))
    refused = 0
    for part in call.input:
        broken = onnx.ModelProto.FromString(good.SerializeToString())
        tensor = next(t for t in broken.graph.initializer if t.name == part)
        value = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.UINT4:
            continue
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value[: len(value) // 2]), part))
        onnx.save(broken, tmp_path / "c.onnx")
        with pytest.raises(FileError, match=r"the packed weight w\d is damaged \("):
            unpack(tmp_path / "c.onnx", tmp_path / "d.onnx")
        refused += 1
    assert refused >= 4


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("smallest", [False, True])
def test_javascript_gives_the_same_bits(smallest, weights, tmp_path):
    rng = np.random.default_rng(3)
    source = file_of(tmp_path / "a.onnx", weights["both"] if smallest else [bell(rng, (10, 100), 12.0) for _ in range(60)])
    report = pack(source, tmp_path / "b.onnx", smallest=smallest)
    assert any(row.codec.startswith("together") for row in report.rows)
    script = f'import {{ unpack }} from "{UNPACK.as_uri()}"; import fs from "fs";'
    script += 'fs.writeFileSync("c.onnx", unpack(fs.readFileSync("b.onnx")));'
    subprocess.run(["node", "--input-type=module", "-e", script], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    prove(tmp_path / "c.onnx", tmp_path / "b.onnx", "test")
    for tensor in onnx.load(tmp_path / "c.onnx").graph.initializer:
        index = int(tensor.name[1:])
        expected = numpy_helper.to_array(next(t for t in onnx.load(source).graph.initializer if t.name == f"w{index}"))
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)
