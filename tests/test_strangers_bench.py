"""`bench` times what it says: free sizes are given or refused, every type is fed or refused, and the shapes stand in the table."""

import json

import numpy as np
import onnx
import pytest
from onnx import parser

import torchopt
from torchopt.cli.commands import status
from torchopt.runtime import InputShape, parse_inputs


def written(path, inputs: str, body: str, output: str = "y"):
    """A file with these inputs and nodes."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({output}) {{ {body} }}')
    onnx.save(model, path)
    return path


def timed(path, **options):
    return torchopt.benchmark(path, repeats=1, progress=False, **options).rows[0].inputs


@pytest.fixture
def picture(tmp_path):
    return written(tmp_path / "p.onnx", "float[N, 3, height, width] x", "y = Relu (x)")


def test_free_height_and_width_are_refused_with_a_spelling(picture, capsys) -> None:
    with pytest.raises(
        torchopt.ConfigError, match=r"free that decide what is computed: x \(N, 3, height, width\); give them, such as --input"
    ):
        timed(picture)
    assert status(["bench", str(picture), "--repeats", "3"]) == 2
    message = capsys.readouterr().err
    assert "--input x:1,3,224,224 (in Python inputs={'x': (1, 3, 224, 224)})" in message
    assert message.count("\n") == 1


def test_the_timed_shapes_stand_in_table_and_json(picture, capsys) -> None:
    assert status(["bench", str(picture), "--repeats", "3", "--input", "x:2,3,32,48:float32", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["inputs"] == {"x": {"shape": [2, 3, 32, 48], "dtype": "float32"}}
    timing = torchopt.benchmark([picture, picture], repeats=1, progress=False, inputs={"x": (2, 3, 32, 48)})
    assert str(timing).rstrip().endswith("timed on x 2×3×32×48 float32")
    timing = torchopt.benchmark([picture, picture], repeats=1, progress=False, inputs=[{"x": (1, 3, 8, 8)}, {"x": (1, 3, 9, 9)}])
    assert str(timing).splitlines()[-2:] == ["p.onnx: timed on x 1×3×8×8 float32", "p.onnx: timed on x 1×3×9×9 float32"]


def test_the_batch_alone_may_be_free(tmp_path) -> None:
    path = written(tmp_path / "b.onnx", "float[N, 3] x, float[N] w", "s = Unsqueeze (w, a) y = Mul (x, s)".replace("a)", "axes)"))
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    onnx.save(model, path)
    assert {n: v["shape"] for n, v in timed(path, batch=4).items()} == {"x": [4, 3], "w": [4]}


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ("float[time] x", "--input x:128 "),
        ("float[nodes, 3] x, int64[2, edges] e", "--input e:2,128 "),
        ("float[n, n] x", "--input x:128,128 "),
    ],
)
def test_a_length_is_no_batch(tmp_path, inputs, named) -> None:
    path = written(tmp_path / "l.onnx", inputs, "y = Relu (x)")
    with pytest.raises(torchopt.ConfigError) as error:
        timed(path)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "kind", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16", "double"]
)
def test_every_type_of_number_is_fed(tmp_path, kind) -> None:
    path = written(tmp_path / "t.onnx", f"{kind}[N, 3] x", "y = Cast <to = 1> (x)")
    assert timed(path)["x"] == {"shape": [1, 3], "dtype": {"double": "float64"}.get(kind, kind)}


def test_bfloat16_comes_out_and_strings_go_in(tmp_path) -> None:
    path = written(tmp_path / "b.onnx", "bfloat16[1, 3] x", "y = Identity (x)", "bfloat16[1, 3] y")
    assert timed(path)["x"]["dtype"] == "bfloat16"
    path = written(tmp_path / "s.onnx", "string[N, 3] x", "y = Identity (x)", "string[N, 3] y")
    assert timed(path)["x"] == {"shape": [1, 3], "dtype": "string"}


@pytest.mark.parametrize("kind", ["seq(float[1, 3])", "int4[1, 3]", "float8e4m3fn[1, 3]"])
def test_what_cannot_be_fed_is_one_sentence(tmp_path, kind) -> None:
    body = "i = Constant <value_int = 0> () y = SequenceAt (x, i)" if kind.startswith("seq") else "y = Cast <to = 1> (x)"
    path = written(tmp_path / "t.onnx", f"{kind} x", body, "float[1, 3] y")
    with pytest.raises(
        torchopt.FileError, match="its input x is of type .*, which cannot be fed; a tensor of numbers or strings is needed"
    ):
        timed(path)


def test_inputs_that_do_not_fit(picture, tmp_path) -> None:
    for given, message in [
        ({"y": (1, 3, 8, 8)}, "no file has an input 'y'; the inputs are x"),
        ({"x": (1, 4, 8, 8)}, r"its input x has the shape \(any, 3, any, any\), and 1,4,8,8 is given"),
        ({"x": (1, 3, 8)}, r"has the shape \(any, 3, any, any\), and 1,3,8 is given"),
        ({"x": InputShape(shape=(1, 3, 8, 8), dtype="int64")}, "x is of type float32, and int64 is given; give float32"),
        ({"x": np.zeros((1, 3, 8, 8))}, "x is of type float32, and float64 is given"),
        ([], "0 dicts of inputs for 1 files; give one for each, or one dict for all"),
    ]:
        with pytest.raises(torchopt.ConfigError, match=message):
            timed(picture, inputs=given)
    path = written(tmp_path / "m.onnx", "float[1, N] x, float[1, M] z", "y = Add (x, z)")
    with pytest.raises(torchopt.DataError, match="does not run it on x 1×3 float32, z 1×4 float32: .*"):
        timed(path, inputs={"x": (1, 3), "z": (1, 4)})


def test_a_file_without_shapes_takes_what_is_given(tmp_path) -> None:
    path = written(tmp_path / "n.onnx", "float[N] x", "y = Relu (x)")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    assert timed(path, inputs={"x": (2, 5)})["x"]["shape"] == [2, 5]


@pytest.mark.slow
def test_peak_memory_is_of_the_same_inputs(picture) -> None:
    row = torchopt.benchmark(picture, repeats=1, inputs={"x": (1, 3, 2048, 2048)}, memory=True, progress=False).rows[0]
    assert row.peak_bytes > 4 * 3 * 2048 * 2048, "at least what goes in"


def test_a_bare_path_is_one_file(picture) -> None:
    for path in (picture, str(picture)):
        assert len(torchopt.benchmark(path, repeats=1, inputs={"x": (1, 3, 8, 8)}, progress=False).rows) == 1


@pytest.mark.parametrize("text", ["x", "x:", ":1,2", "x:1,,2", "x:1,a", "x:1.5"])
def test_other_spellings_are_refused(text) -> None:
    with pytest.raises(torchopt.ConfigError, match="--input: got .*; NAME:SIZE,SIZE,… is needed"):
        parse_inputs([text])


def test_an_input_given_twice_is_refused() -> None:
    with pytest.raises(torchopt.ConfigError, match="x is given twice"):
        parse_inputs(["x:1", "x:2"])
