"""`one_shot(..., evaluate=…)`: the fewest layers float with which the user's own score holds."""

import pytest
import torch
from test_fallback import slow
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.compress import fallback_by_latency as fallback

X = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
PLAIN = {"observer": "minmax", "rounding": "nearest", "equalize": False}
COARSE = Rule("2", quantize=Quantize(weight_bits=2, fallback="auto", **PLAIN))
FINE = Rule("*", quantize=Quantize(fallback="auto", **PLAIN))


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(fallback, "benchmark", slow())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 10)).eval()


def closeness():
    """Minus the mean squared error of a model's outputs, relative to the float model's power; 0 is best. Counts its calls."""
    with torch.no_grad():
        exact = net()(X)

    def evaluate(model: nn.Module) -> float:
        evaluate.calls += 1
        with torch.no_grad():
            return -float((model(X) - exact).square().mean() / exact.square().mean())

    evaluate.calls = 0
    return evaluate


def floats(model: nn.Module, tmp_path) -> set[str]:
    torchopt.export(model, (X[:1],), tmp_path / "m.onnx")
    return {layer.split(".")[0] for layer in torchopt.inspect(tmp_path / "m.onnx").float}


def compress(rules, evaluate, max_drop):
    return torchopt.one_shot(net(), rules, [X], example_inputs=(X[:1],), evaluate=evaluate, max_drop=max_drop, progress=False)


def test_the_one_layer_that_costs_the_score_stays_float(tmp_path):
    evaluate = closeness()
    assert floats(compress([COARSE, FINE], evaluate, 1e-4), tmp_path) == {"2"}
    assert evaluate.calls == 3, "float, all integers, one float"


def test_nothing_stays_float_where_the_score_holds(tmp_path):
    evaluate = closeness()
    assert floats(compress([COARSE, FINE], evaluate, 10.0), tmp_path) == set()
    assert evaluate.calls == 2


def test_a_drop_of_zero_leaves_every_layer_float(tmp_path):
    assert floats(compress([FINE], closeness(), 0.0), tmp_path) == {"0", "2", "4", "6", "8"}


@pytest.mark.parametrize(
    ("rules", "evaluate", "drop", "error", "message"),
    [
        (
            [Rule("*", quantize=Quantize())],
            lambda m: 1.0,
            0.1,
            torchopt.ConfigError,
            r"give their rules Quantize\(fallback='auto'\)",
        ),
        ([FINE], lambda m: 1.0, -1, torchopt.ConfigError, "max_drop=-1; 0 or more is needed"),
        ([FINE], lambda m: float("nan"), 0.1, torchopt.DataError, "evaluate returned nan; a finite number is needed"),
    ],
)
def test_bad_input(rules, evaluate, drop, error, message):
    with pytest.raises(error, match=message):
        compress(rules, evaluate, drop)


def test_masks_that_cost_too_much_are_named():
    cut = torchopt.Prune(schedule=torchopt.ConstantSparsity(target_sparsity=0.98, begin_step=0))
    rule = Rule("*", prune=cut, quantize=Quantize(fallback="auto", **PLAIN))
    with pytest.raises(torchopt.TargetError, match="with all 5 layers float the score is .* masks or tables cost it"):
        compress([rule], closeness(), 1e-5)


def test_layers_cannot_be_ranked_without_data():
    rule = Rule("*", quantize=Quantize(mode="weight_only", weight_bits=2, fallback="auto"))
    with pytest.raises(torchopt.ConfigError, match="which data shows; give batches"):
        torchopt.one_shot(net(), [rule], example_inputs=(X[:1],), evaluate=closeness(), max_drop=0.0, progress=False)
