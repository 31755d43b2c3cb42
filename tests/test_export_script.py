"""scripts/export.py on a checkpoint of one's own, and every refusal."""

import importlib.util
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[1] / "scripts" / "export.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("export_script", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    source = """
        from torch import nn
        def build():
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
        def number():
            return 3
    """
    (tmp_path / "export_script_net.py").write_text(textwrap.dedent(source))
    return module


def network():
    import export_script_net

    torch.manual_seed(0)
    return export_script_net.build().eval()


def call(script, *extra: str) -> int:
    return script.main(["--model", "export_script_net:build", "--input-shape", "3,8,8", "--out", "m.onnx", *extra])


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "inside a trainer's checkpoint"])
def test_a_checkpoint_becomes_a_file_proven_equal(script, tmp_path, capsys, nested) -> None:
    assert call(script) == 0  # also makes the module importable
    model = network()
    state = {f"module.{k}": v for k, v in model.state_dict().items()} if nested else model.state_dict()
    torch.save({"epoch": 3, "state_dict": state} if nested else state, "best.pt")
    assert call(script, "--checkpoint", "best.pt") == 0
    assert "2 weights bit-equal" in capsys.readouterr().out
    from torchopt.export import decode_initializers

    np.testing.assert_array_equal(decode_initializers("m.onnx")["0.weight"], model[0].weight.detach().numpy())


@pytest.mark.parametrize(
    ("extra", "integers"),
    [((), 2), (("--quantize",), 2), (("--quantize", "--weight-bits", "4"), 2), (("--no-quantize",), 0), (("--half",), 0)],
)
def test_calibration_data_quantizes_unless_told_otherwise(script, capsys, extra, integers) -> None:
    np.save("x.npy", np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32))
    assert call(script, "--calibration", "x.npy", *extra) == 0
    assert f"{integers} of 2 layers run as integers" in capsys.readouterr().out


def test_half(script, capsys) -> None:
    assert call(script, "--no-pack") == 0
    full = Path("m.onnx").stat().st_size
    assert call(script, "--no-pack", "--half") == 0
    assert Path("m.onnx").stat().st_size < 0.65 * full
    assert "bit-equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--quantize"], "--quantize: needs --calibration DIR"),
        (["--quantize", "--half", "--calibration", "x"], "--half: contradicts --quantize; choose one"),
        (["--input-shape", "3,x"], "--input-shape: got '3,x'; the sizes of one input are needed"),
        (["--checkpoint", "none.pt"], "none.pt: no such file; the path of saved weights is needed"),
        (["--checkpoint", "export_script_net.py"], "export_script_net.py: not a file of weights"),
        (["--checkpoint", "other.pt"], "other.pt: the weights do not fit Sequential"),
        (["--checkpoint", "list.pt"], "list.pt: holds no state_dict"),
        (["--model", "export_script_net:number"], "returned int; a torch.nn.Module is needed"),
    ],
)
def test_mistakes_exit_with_2_and_one_sentence(script, capsys, extra, message) -> None:
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    torch.save([1, 2], "list.pt")
    assert call(script, *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("m.onnx").exists()
