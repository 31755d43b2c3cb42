"""What the oldest torch that pyproject.toml allows has not, taken away from the one that is installed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchopt import ModelError, export
from torchopt.channels.follow.rules import POINTWISE
from torchopt.train import Train


def test_precision_auto_is_float32_where_torch_does_not_say_what_the_processor_can(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not Train(epochs=1, precision="auto").autocasts(torch.device("cpu"))


def test_a_branch_that_the_exporter_fixed_is_refused(monkeypatch, tmp_path):
    """torch 2.8 exports a forward that depends on data as the one way that the example takes."""
    monkeypatch.setattr(
        torch.onnx, "export", lambda *_, **__: SimpleNamespace(_capture_strategy="TorchExportDraftExportStrategy")
    )
    with pytest.raises(ModelError, match="Linear cannot be exported to ONNX: its forward depends on data"):
        export(nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish])
def test_activations_are_known_without_torchs_mark(kind):
    name = {nn.ReLU6: "hardtanh", nn.LeakyReLU: "leaky_relu"}.get(kind, kind.__name__.lower())
    assert name in POINTWISE
