"""`verify(layers=True)` names the first layer whose output in the file is not the model's."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from torchopt import Quantize, Rule, export, one_shot, verify
from torchopt.runtime.layers import layer_differences


class Twice(nn.Module):
    """Convolutions with a batch norm, a residual, one layer used twice, and a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.head(self.last(x).mean((2, 3)))


def model_of(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(8, 3, 12, 12)
    model.stem[1].running_var.uniform_(0.5, 2)
    if kind == "float":
        return model, x
    quantize = {"int8": Quantize(observer="minmax"), "dynamic": Quantize(mode="dynamic")}[kind]
    rules = [Rule("head", quantize=quantize)] if kind == "dynamic" else [Rule("*", quantize=quantize)]
    return one_shot(model, rules, [x], example_inputs=(x[:1],), progress=False), x


def spoil(path, name: str) -> None:
    """Change one weight in the file, and with it the layer's output."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    w = numpy_helper.to_array(tensor).copy()
    w[0] = w[0] // 2 + 40 if w.dtype.kind == "i" else w[0] + 0.5
    tensor.CopyFrom(numpy_helper.from_array(w, name))
    onnx.save(model, path)


@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", ["float", "int8", "dynamic"])
def test_P7_no_layer_differs_in_a_right_file(tmp_path, kind, pack) -> None:
    model, x = model_of(kind)
    export(model, (x[:1],), tmp_path / "m.onnx", pack=pack)
    verdict = verify(model, tmp_path / "m.onnx", [x], layers=True, progress=False)
    assert verdict.first_layer is None, layer_differences(model, tmp_path / "m.onnx", x)
    assert verdict.layers_compared == 5
    assert str(verdict).endswith("of 5 layers none differs")


@pytest.mark.parametrize("layer", ["stem.0", "shared", "last", "head"])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_P7_the_first_layer_that_differs_is_named(tmp_path, kind, layer) -> None:
    model, x = model_of(kind)
    export(model, (x[:1],), tmp_path / "m.onnx", pack=False)
    spoil(tmp_path / "m.onnx", f"{layer}.weight")
    verdict = verify(model, tmp_path / "m.onnx", [x], layers=True, progress=False)
    assert verdict.first_layer == layer
    assert str(verdict).endswith(f"of 5 layers the first to differ is {layer}")


def test_layers_come_in_the_files_order_and_the_tolerance_decides(tmp_path) -> None:
    model, x = model_of("float")
    export(model, (x[:1],), tmp_path / "m.onnx", pack=False)
    found = layer_differences(model, tmp_path / "m.onnx", x)
    assert [d.layer for d in found] == ["stem.0", "shared", "shared", "last", "head"]
    assert max(d.relative for d in found) < 1e-5
    assert all(np.isfinite(d.max_abs) for d in found)
    assert verify(model, tmp_path / "m.onnx", [x], layers=True, tolerance=-1, progress=False).first_layer == "stem.0"


def test_without_the_request_nothing_is_compared(tmp_path) -> None:
    model, x = model_of("float")
    export(model, (x[:1],), tmp_path / "m.onnx")
    verdict = verify(model, tmp_path / "m.onnx", [x], progress=False)
    assert (verdict.layers_compared, verdict.first_layer) == (0, None)
    assert "layers" not in str(verdict)
