"""One operator a quantizer while the exporter traces: the file is that of the two ONNX operators written one by one, byte for byte."""

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.export import graph
from torchopt.quantize.layers.rounding import FixedQuantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Residual(nn.Module):
    """A convolution, a sum, a pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.conv(x)).mean((2, 3)))


def quantized() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    rules = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]
    return torchopt.one_shot(Residual().eval(), rules, [x], example_inputs=(x,), progress=False), x


@pytest.mark.parametrize("opset", [17, 21, 23])
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_the_file_is_that_of_two_operators(tmp_path, monkeypatch, opset, dynamic_batch):
    model, x = quantized()
    torchopt.export(model, (x,), tmp_path / "one.onnx", opset=opset, dynamic_batch=dynamic_batch, pack=False)
    monkeypatch.setattr(graph, "trace_grids", lambda module: None)
    torchopt.export(model, (x,), tmp_path / "two.onnx", opset=opset, dynamic_batch=dynamic_batch, pack=False)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_the_model_itself_stays_as_it_is(tmp_path):
    model, x = quantized()
    torchopt.export(model, (x,), tmp_path / "m.onnx")
    kinds = {type(m) for m in model.modules() if isinstance(m, FixedQuantize)}
    assert kinds == {FixedQuantize}
