"""Hardswish and SiLU between quantized layers run as integers, and compute what they should."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchopt import Quantize, Rule, export, inspect, one_shot, verify


class Functional(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(x)))


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in ("hardswish", "silu"):
        return Functional(getattr(F, kind)).eval()
    return Functional({"Hardswish": nn.Hardswish, "SiLU": nn.SiLU}[kind]()).eval()


@pytest.mark.parametrize("kind", ["Hardswish", "hardswish", "SiLU", "silu"])
def test_Q_gated_activations_run_as_integers(tmp_path, kind) -> None:
    model, x = net(kind), torch.randn(16, 3, 12, 12)
    rules = [Rule("*", quantize=Quantize(observer="minmax"))]
    final = one_shot(model, rules, [x], example_inputs=(x[:1],), progress=False)
    export(final, (x[:1],), tmp_path / "m.onnx")
    kernels = inspect(tmp_path / "m.onnx").kernels
    assert kernels["QLinearMul"] == 1
    assert kernels["QLinearConv"] == 2
    assert kernels["QLinearAdd" if kind.lower() == "hardswish" else "QLinearSigmoid"] == 1
    assert not {"HardSigmoid", "HardSwish", "Sigmoid", "Mul", "Add"} & set(kernels)
    assert verify(final, tmp_path / "m.onnx", [x], progress=False).weights_equal
    expected, found = model(x).detach().numpy(), final(x).detach().numpy()
    noise = ((expected - found) ** 2).sum() / (expected**2).sum()
    assert -10 * np.log10(noise) > 30  # dB


def test_a_gate_after_a_float_layer_stays_whole() -> None:
    model, x = net("Hardswish"), torch.randn(4, 3, 12, 12)
    final = one_shot(model, [Rule("b", quantize=Quantize())], [x], example_inputs=(x[:1],), progress=False)
    assert any(isinstance(m, nn.Hardswish) for m in final.modules())
