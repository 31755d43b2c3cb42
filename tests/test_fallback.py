"""fallback="auto": integers only where they are not slower than float, measured."""

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule, StateError
from torchopt.compress import fallback_by_latency as fallback
from torchopt.runtime.benchmark import Row, Timing

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
RULE = Rule("*", quantize=Quantize(fallback="auto"))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()


def slow(*kinds: str):
    """A machine on which integers of these kinds of layers are slow."""

    def benchmark(paths, **_):
        rows = []
        for path in paths:
            layers = torchopt.inspect(path).integer
            ratio = 1.0
            for kind, names in (("conv", ("0", "2")), ("linear", ("5",))):
                if any(layer.split(".")[0] in names for layer in layers):
                    ratio *= 3.0 if kind in kinds else 0.5
            rows.append(ratio)
        return Timing(rows=[_row(str(p), r) for p, r in zip(paths, rows, strict=True)], threads=1, repeats=1, batch=1)

    return benchmark


def _row(path: str, ratio: float) -> Row:
    numbers = dict.fromkeys(("latency_ms", "low_ms", "high_ms", "load_ms"), 1.0)
    return Row(path=path, ratio=ratio, ratio_low=ratio, ratio_high=ratio, size_bytes=1, peak_bytes=None, **numbers)


def integers(tmp_path) -> set[str]:
    final = torchopt.one_shot(net(), [RULE], [X], example_inputs=(X[:1],), progress=False)
    torchopt.export(final, (X[:1],), tmp_path / "model.onnx")
    return {layer.split(".")[0] for layer in torchopt.inspect(tmp_path / "model.onnx").integer}


@pytest.mark.parametrize(
    ("slower", "kept"), [((), {"0", "2", "5"}), (("linear",), {"0", "2"}), (("conv",), {"5"}), (("conv", "linear"), set())]
)
def test_only_kinds_that_are_faster_stay_integer(monkeypatch, tmp_path, slower, kept):
    monkeypatch.setattr(fallback, "benchmark", slow(*slower))
    assert integers(tmp_path) == kept


def test_what_was_left_float_is_reported_with_the_measured_ratio(monkeypatch):
    monkeypatch.setattr(fallback, "benchmark", slow("linear"))
    ready = torchopt.prepare(net(), [RULE], (X[:1],))
    (row,) = torchopt.report(ready).to_dict()["skipped"]
    assert row["name"] == "5.weight"
    assert "take 1.50 × the time of float" in row["reason"]


def test_the_decision_is_saved_and_not_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(fallback, "benchmark", slow("linear"))
    ready = torchopt.calibrate(torchopt.prepare(net(), [RULE], (X[:1],)), [X], progress=False)
    torchopt.save(ready, tmp_path / "model.safetensors")
    monkeypatch.setattr(fallback, "benchmark", None)
    again = torchopt.load(tmp_path / "model.safetensors", net())
    assert torch.equal(again.eval()(X), ready.eval()(X))


def test_example_inputs_are_needed():
    with pytest.raises(StateError, match=r"fallback='auto' times the network; give example_inputs"):
        torchopt.prepare(net(), [RULE])
