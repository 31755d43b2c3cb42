"""The command line: exit codes, one line for a user's mistake, JSON where a table is printed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchopt.cli import commands as cli
from torchopt.export import export

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits.yaml"


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("torchopt: ")
    return captured.err


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64))
    net[3].weight.data = (net[3].weight.data * 300).round() / 300
    export(net.eval(), (torch.zeros(1, 1, 8, 8),), tmp_path / "net.onnx", pack=False)
    return tmp_path / "net.onnx"


def test_check_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["check", str(RECIPE)]) == 0
    assert "features.3.first.conv.weight" in capsys.readouterr().out
    assert cli.status(["check", str(RECIPE), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["weight"] == "features.0.conv.weight"
    assert {r["rule"] for r in rows} == {"*"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
        (["check", str(RECIPE), "--set", "train.epoch=1"], "stages.0.train.epoch: unknown key; did you mean 'epochs'"),
        (["check", str(RECIPE), "--set", "train.epochs=0"], "Train.epochs: got 0; at least 1 is needed"),
        (["check", str(RECIPE), "--set", "stages.1.compress.0.match=nothing.*"], "rule 1 (match='nothing.*'): matches no"),
        (["rum", "x"], "No such command 'rum'"),
        (["run", "x.yaml"], "Missing option '--out'"),
        (["run", str(RECIPE), "--out", "x", "--resume", "--overwrite"], "--resume: cannot be used with --overwrite"),
        (["run", "none.yaml", "--out", "x"], "none.yaml: cannot be read"),
        (["inspect", "none.onnx"], "none.onnx"),
        (["bench", "none.onnx"], "none.onnx: there is no such file"),
        (["pack", "none.onnx", "out.onnx"], "none.onnx"),
        (["unpack", "none.onnx", "out.onnx"], "none.onnx"),
        (["report", "none.onnx"], "none.onnx"),
        (["export", "torch.nn:Identity", "--out", "x.onnx"], "--input-shape: got None; three numbers C,H,W are needed"),
        (["export", "none", "--out", "x.onnx"], "none/report.json: cannot be read; the folder of a finished run is needed"),
        (["export", "a:b", "--out", "x.onnx", "--input-shape", "1,8,8"], "model.import: no module named 'a'"),
        (["quantize", "a:b", "--data", "d", "--input-shape", "1,x"], "--input-shape: got '1,x'"),
        (["quantize", "torch.nn:Identity", "--data", "none", "--input-shape", "1,8,8"], "none: no such folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in _fails(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_the_process_itself_exits_with_two_and_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-m", "torchopt", "check", "none.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_defect_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchopt.run.matched", lambda recipe: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.status(["check", str(RECIPE)])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.status(["--help"]) == 0
    assert "quantize" in capsys.readouterr().out
    assert cli.status(["--version"]) == 0
    assert "torchopt" in capsys.readouterr().out
    assert cli.status([]) == 2


def test_pack_and_unpack_are_inverse(onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, dense = tmp_path / "packed.onnx", tmp_path / "dense.onnx"
    assert cli.status(["pack", str(onnx_file), str(packed)]) == 0
    assert cli.status(["unpack", str(packed), str(dense)]) == 0
    assert packed.stat().st_size < onnx_file.stat().st_size / 2
    capsys.readouterr()
    assert cli.status(["bench", str(dense), str(packed), "--repeats", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert cli.status(["inspect", str(packed), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["float"]) == 2
    assert cli.status(["report", str(packed), "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]} >= {"3.weight"}


def test_bench_inspect_and_report_print_tables(onnx_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["bench", str(onnx_file), "--repeats", "3"], ["inspect", str(onnx_file)], ["report", str(onnx_file)]):
        assert cli.status(command) == 0
        assert len(capsys.readouterr().out.splitlines()) >= 2


NETWORK = """\
from torch import nn


def build(classes=4):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )
"""


def test_export_and_quantize_a_network_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_network.py").write_text(NETWORK)
    arguments = ["export", "my_network:build", "--out", "float.onnx", "--input-shape", "1,8,8", "--pack", "no", "--json"]
    assert cli.status(arguments) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == (tmp_path / "float.onnx").stat().st_size
    np.save("inputs.npy", np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32))
    assert cli.status(["quantize", "my_network:build", "--data", "inputs.npy", "--input-shape", "1,8,8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verify"]["weights_equal"] is True
    assert cli.status(["inspect", "model.onnx", "--json"]) == 0
    placement = json.loads(capsys.readouterr().out)
    assert (len(placement["integer"]), placement["float"]) == (2, [])


def test_pictures_of_a_folder_calibrate(tmp_path: Path) -> None:
    from PIL import Image

    from torchopt.data import read_inputs
    from torchopt.errors import DataError, FileError

    with pytest.raises(DataError, match="holds no pictures"):
        read_inputs(tmp_path, size=(3, 8, 8))
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (20, 10), (i, 0, 255)).save(tmp_path / "a" / "b" / f"{i}.png")
    found = read_inputs(tmp_path, size=(3, 8, 8), samples=4, normalize=((0, 0, 0), (1, 1, 1)))
    assert found.shape == (4, 3, 8, 8)
    torch.testing.assert_close(found[:, 2], torch.ones(4, 8, 8))
    assert read_inputs(tmp_path, size=(1, 8, 8), normalize=((0,), (1,))).shape == (6, 1, 8, 8)
    (tmp_path / "a" / "broken.png").write_text("x")
    with pytest.raises(FileError, match="broken.png: is no picture that can be read"):
        read_inputs(tmp_path, size=(3, 8, 8))
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8)))
    with pytest.raises(DataError, match=r"holds an array of shape \(2, 8, 8\); \(N, 3, 8, 8\) is needed"):
        read_inputs(tmp_path / "x.npy", size=(3, 8, 8))
    (tmp_path / "y.npy").write_text("x")
    with pytest.raises(FileError, match="y.npy: cannot be read as an array"):
        read_inputs(tmp_path / "y.npy", size=(3, 8, 8))
