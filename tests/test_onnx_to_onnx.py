"""ONNX in, ONNX out: weights of a file without source in fewer bits, compared with the source by the code that a user runs."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from torchopt.cli.commands import status
from torchopt.errors import ConfigError, DataError, FileError, ModelError
from torchopt.onnx_file.read import read
from torchopt.onnx_file.view import View
from torchopt.onnx_to_onnx import compress_onnx
from torchopt.onnx_to_onnx.forms import rounded
from torchopt.onnx_to_onnx.rewrite import weights
from torchopt.runtime import session

RNG = np.random.default_rng(0)
W1 = (RNG.standard_normal((32, 16, 3, 3)) * np.geomspace(0.01, 1, 32)[:, None, None, None]).astype(np.float32)
W2 = RNG.standard_normal((32, 64)).astype(np.float32)
TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 16, H, W] x) => (float[N, 64] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1)
  b = Relu (a)
  c = GlobalAveragePool (b)
  d = Flatten (c)
  y = MatMul (d, w2)
}"""


def _model(text: str = TEXT, **tensors: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(_model(w1=W1, w2=W2), tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


SIZES = {"x": (2, 16, 8, 8)}


def test_one_scale_a_channel_is_chosen_where_channels_differ() -> None:
    form = rounded(W1, "int8")
    assert form is not None
    assert form.scale is not None
    assert form.scale.shape == (32, 1, 1, 1)
    assert (np.abs(form.value - W1) < np.abs(W1).max(axis=(1, 2, 3), keepdims=True) / 253).all()
    np.testing.assert_array_equal(form.value, form.codes.astype(np.float32) * form.scale)


def test_one_scale_is_chosen_where_more_do_not_help() -> None:
    even = RNG.uniform(-1, 1, (64, 64)).astype(np.float32)  # the largest of each row and column is nearly 1
    form = rounded(even, "int8")
    assert form is not None
    assert form.scale is not None
    assert form.scale.size == 1


@pytest.mark.parametrize(
    ("kind", "clusters", "least"), [("int8", 0, 35), ("int4", 0, 14), ("float16", 0, 60), ("shared", 16, 15)]
)
def test_zeros_stay_zeros_and_the_error_is_small(kind: str, clusters: int, least: float) -> None:
    w = RNG.standard_normal((64, 64)).astype(np.float32)
    w[RNG.random(w.shape) < 0.5] = 0
    form = rounded(w, kind, clusters)
    assert form is not None
    assert not form.value[w == 0].any()
    assert 10 * np.log10(np.square(w).mean() / np.square(form.value - w).mean()) > least


def test_float16_is_left_out_where_it_would_be_infinite() -> None:
    assert rounded(np.full((32, 32), 7e4, np.float32), "float16") is None


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [({}, 35, 0.31), ({"weights": "int4"}, 15, 0.22), ({"weights": "float16"}, 55, 0.56), ({"n_clusters": 16}, 15, 0.2)],
)
def test_the_file_is_smaller_and_like_the_source(source: Path, tmp_path: Path, options: dict, least: float, most: float) -> None:
    result = compress_onnx(source, tmp_path / "b.onnx", inputs=SIZES, time=False, **options)
    assert result.likeness.sqnr_db is not None
    assert result.likeness.sqnr_db > least
    assert result.size_bytes == (tmp_path / "b.onnx").stat().st_size < most * result.original_bytes
    assert result.tensors == 2
    # What the result says of itself is true of the file: another run, on sizes that it never saw.
    feed = {"x": RNG.standard_normal((3, 16, 11, 5)).astype(np.float32)}
    y, z = (session(path).run(None, feed)[0] for path in (source, tmp_path / "b.onnx"))
    assert 10 * np.log10(y.var() / np.square(y - z).mean()) > least - 6


def test_nothing_is_decoded_at_each_run(source: Path, tmp_path: Path) -> None:
    compress_onnx(source, tmp_path / "b.onnx", inputs=SIZES, time=False)
    session(tmp_path / "b.onnx", optimized_to=tmp_path / "o.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node}
    assert not kinds & {"Cast", "Mul", "Gather", "GatherElements", "Reshape"}, kinds


def test_weights_in_constants_and_branches_are_found(tmp_path: Path) -> None:
    w = RNG.standard_normal((64, 32)).astype(np.float32)
    model = _model("""<ir_version: 10, opset_import: ["": 21]> g (float[N, 64] x, bool f) => (float[N, 32] y) {
      y = If (f) <then_branch = a () => (float[N, 32] p) {v = Constant <value = float[1] {0.0}> ()  p = MatMul (x, v)},
                  else_branch = b () => (float[N, 32] q) {q = MatMul (x, w)}>
    }""", w=w)  # fmt: skip
    constant = next(n for n in model.graph.node[0].attribute[0].g.node if n.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(w * 2, "v"))
    onnx.save(model, tmp_path / "a.onnx")
    assert [c.origin for c in weights(View(read(tmp_path / "a.onnx")))] == ["initializer", "constant"]
    result = compress_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", time=False)
    assert result.tensors == 2
    for flag in (True, False):
        feed = {"x": RNG.standard_normal((5, 64)).astype(np.float32), "f": np.array(flag)}
        y, z = (session(tmp_path / name).run(None, feed)[0] for name in ("a.onnx", "b.onnx"))
        assert 10 * np.log10(y.var() / np.square(y - z).mean()) > 38


def test_static_integers_from_calibration_data(source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=RNG.standard_normal((32, 16, 8, 8)).astype(np.float32))
    result = compress_onnx(source, tmp_path / "b.onnx", calibration=tmp_path / "data.npz", time=False)
    assert result.form == "int8 weights, static activations"
    assert result.likeness.inputs == "given"
    assert result.likeness.samples == 32
    assert result.likeness.sqnr_db is not None
    assert result.likeness.sqnr_db > 20
    session(tmp_path / "b.onnx", optimized_to=tmp_path / "o.onnx")
    assert "QLinearConv" in {node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node}


def test_dynamic_integers_need_no_data(source: Path, tmp_path: Path) -> None:
    result = compress_onnx(source, tmp_path / "b.onnx", activations="dynamic", inputs=SIZES, time=False)
    assert result.form == "int8 weights, dynamic activations"
    assert result.size_bytes < 0.4 * result.original_bytes


def test_a_file_that_cannot_become_smaller_stays_as_it_was(tmp_path: Path) -> None:
    rows = np.repeat(RNG.standard_normal((1, 2)).astype(np.float32), 512, axis=0)
    codes = _model("""<ir_version: 10, opset_import: ["": 21]> g (float[N, 512] x) => (float[N, 2] y) {
      s = Constant <value_ints = [512, 2]> ()
      w = Expand (r, s)
      y = MatMul (x, w) }""", r=rows[:1])  # fmt: skip
    onnx.save(codes, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="no float32 weight of a layer with 1,024 elements"):
        compress_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", time=False)
    assert not (tmp_path / "b.onnx").exists()
    small = _model("""<ir_version: 10, opset_import: ["": 21]> g (float[N, 64] x) => (float[N, 64] y) {
      w = CastLike (c, x)
      y = MatMul (x, w) }""", c=np.zeros((64, 64), np.int8) + np.eye(64, dtype=np.int8))  # fmt: skip
    onnx.save(small, tmp_path / "c.onnx")
    with pytest.raises(ModelError, match="nothing to round"):
        compress_onnx(tmp_path / "c.onnx", tmp_path / "b.onnx", time=False)


def test_the_latency_that_it_tells_was_measured(source: Path, tmp_path: Path) -> None:
    result = compress_onnx(source, tmp_path / "b.onnx", inputs=SIZES)
    assert result.latency_ratio is not None
    assert result.latency_ratio > 0
    assert f"latency × {result.latency_ratio:.2f}" in str(result)
    assert "random samples" in str(result)


def test_external_data_and_the_same_path(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(_model(w1=W1, w2=W2), path, save_as_external_data=True, location="a.bin", size_threshold=0)
    before = session(path).run(None, {"x": np.ones((1, 16, 4, 4), np.float32)})[0]
    result = compress_onnx(path, path, inputs=SIZES, time=False)
    after = session(path).run(None, {"x": np.ones((1, 16, 4, 4), np.float32)})[0]
    assert result.size_bytes < 0.4 * result.original_bytes
    assert np.square(before - after).mean() < 1e-3 * before.var()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int7"}, ConfigError, "weights='int7'; one of int8, int4, float16 is needed"),
        ({"n_clusters": 1}, ConfigError, "n_clusters=1; a whole number from 2 to 256"),
        ({"n_clusters": 4, "weights": "int8"}, ConfigError, "exclude one another"),
        ({"activations": "static"}, ConfigError, "needs data; give calibration="),
        ({"activations": "statik"}, ConfigError, "did you mean 'static'"),
        ({"activations": "dynamic", "n_clusters": 8}, ConfigError, "needs int8 weights"),
        ({"calibration": {"z": np.zeros((4, 16, 8, 8))}}, DataError, "has no input 'z'; it has x"),
        ({"calibration": {"x": np.zeros((0, 16, 8, 8))}}, DataError, "has 0 rows"),
        ({"calibration": "nowhere.npz"}, FileError, "there is no such file"),
        ({"calibration": {"x": np.zeros((4, 16, 8, 8), np.float32)}, "method": "max"}, ConfigError, "method='max'"),
        ({}, ConfigError, "leaves sizes free"),
    ],
)
def test_bad_input_is_one_sentence(source: Path, tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compress_onnx(source, tmp_path / "b.onnx", time=False, **options)
    assert not (tmp_path / "b.onnx").exists()


def test_the_command_tells_what_it_did_and_overwrites_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["compress", str(source), str(tmp_path / "b.onnx"), "--input", "x:2,16,8,8", "--json"]
    assert status(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["size_bytes"] == (tmp_path / "b.onnx").stat().st_size
    assert told["likeness"]["inputs"] == "random"
    assert status(arguments) == 2
    assert "is there already; name another file, or --overwrite" in capsys.readouterr().err
