"""OpenVINO runs the files written for it, float and integer, with outputs that agree; packed ones it refuses, and unpacked they run."""

import numpy as np
import pytest
import torch
from torch import nn

from torchopt import Quantize, Rule, export, one_shot, unpack
from torchopt.runtime import session

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install torchopt-toolkit[openvino]")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU6()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_((p / p.abs().max() * 7).round() * (p.abs().max() / 7))
    return model


def by_openvino(path, x: torch.Tensor) -> np.ndarray:
    """Outputs on the CPU, with float32 sums as in ONNX Runtime."""
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(str(path), "CPU", settings)(x.numpy())[0]


def by_ort(path, x: torch.Tensor) -> np.ndarray:
    opened = session(path)
    return opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0]


def quantized(model: nn.Module, x: torch.Tensor) -> nn.Module:
    rules = [Rule("*", quantize=Quantize(observer="minmax"))]
    return one_shot(model, rules, [x], example_inputs=(x[:1],), target="openvino", progress=False)


def test_P7_float_outputs_agree(tmp_path) -> None:
    model, x = network(), torch.randn(4, 3, 16, 16)
    export(model, (x[:1],), tmp_path / "m.onnx", target="openvino")
    np.testing.assert_allclose(by_openvino(tmp_path / "m.onnx", x), by_ort(tmp_path / "m.onnx", x), rtol=1e-4, atol=1e-5)


def test_P7_integer_outputs_agree_within_a_step(tmp_path) -> None:
    x = torch.randn(64, 3, 16, 16)
    export(quantized(network(), x), (x[:1],), tmp_path / "m.onnx", target="openvino")
    ours, theirs = by_ort(tmp_path / "m.onnx", x), by_openvino(tmp_path / "m.onnx", x)
    step = (ours.max() - ours.min()) / 255
    assert np.abs(ours - theirs).max() <= 2 * step
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 0.98


@pytest.mark.parametrize("integer", [False, True], ids=["float", "int8"])
def test_P7_packed_files_are_refused_and_run_when_unpacked(tmp_path, integer) -> None:
    x = torch.randn(8, 3, 16, 16)
    model = quantized(network(), x) if integer else network()
    result = export(model, (x[:1],), tmp_path / "packed.onnx", target="openvino", pack=True)
    assert result.packing is not None
    with pytest.raises(RuntimeError, match="No conversion rule found for operations: torchopt"):
        by_openvino(tmp_path / "packed.onnx", x)
    unpack(tmp_path / "packed.onnx", tmp_path / "unpacked.onnx")
    export(model, (x[:1],), tmp_path / "dense.onnx", target="openvino")
    np.testing.assert_array_equal(by_openvino(tmp_path / "unpacked.onnx", x), by_openvino(tmp_path / "dense.onnx", x))
