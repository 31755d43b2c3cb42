"""The other modes on networks that stretch them, and one sentence for what they cannot do."""

import math
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn

import torchopt
from torchopt import ConfigError, DataError, ModelError, Quantize, Rule, StateError
from torchopt.compress import fallback_by_latency as fallback

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def decibels(wanted: torch.Tensor, given: torch.Tensor) -> float:
    return 10 * math.log10(float(wanted.var() / (given - wanted).square().mean()))


def file_of(model: nn.Module, x: torch.Tensor, path, **options: object) -> torch.Tensor:
    torchopt.export(model, (x[:1],), path, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("outlier", [100.0, 1000.0])
@torch.no_grad()
def test_blocks_keep_float_activations_under_outliers(outlier, tmp_path):
    """11.8 and 1.7 dB in the file where the kernel rounded its inputs to 8 bits."""
    x = X.clone()
    x[:, 5] *= outlier
    rule = Rule("*", quantize=Quantize(mode="weight_only", weight_bits=4, block_size=32))
    final = torchopt.finalize(torchopt.prepare(net(), [rule])).eval()
    wanted, ours = net()(x), final(x)
    exact = file_of(final, x, tmp_path / "m.onnx")
    assert decibels(ours, exact) > 80
    assert abs(decibels(wanted, exact) - decibels(wanted, ours)) < 0.1
    assert decibels(ours, file_of(final, x, tmp_path / "fast.onnx", fast_blocks=True)) < 60  # what the option says


@torch.no_grad()
def test_one_layer_static_and_another_in_blocks(tmp_path):
    rules = [Rule("0", quantize=Quantize()), Rule("2", quantize=Quantize(mode="weight_only", weight_bits=4, block_size=32))]
    ready = torchopt.calibrate(torchopt.prepare(net(), rules, (X[:1],)), [X], progress=False)  # RuntimeError in reach.py
    final = torchopt.finalize(ready).eval()
    assert decibels(net()(X), final(X)) > 15
    torch.testing.assert_close(file_of(final, X, tmp_path / "m.onnx"), final(X), rtol=1e-4, atol=1e-4)


def test_float16_refuses_a_weight_that_it_cannot_hold():
    big = net()
    big[2].weight.data[0, 0] = 7e4
    rules = [Rule("*", quantize=Quantize(mode="float16"))]
    with pytest.raises(ModelError, match=r"prepare: 2\.weight holds 70000, and float16 ends at 65504"):
        torchopt.prepare(big, rules)
    ready = torchopt.prepare(net(), rules)
    ready[2].weight.data[0, 0] = -7e4
    with pytest.raises(StateError, match=r"finalize: 2\.weight holds 70000 after training, and float16 ends at 65504"):
        torchopt.finalize(ready)


@pytest.mark.parametrize("mode", ["weight_only", "float16"])
def test_16_bit_activations_are_for_static(mode):
    with pytest.raises(ConfigError, match=rf"activation_bits: got 16 with mode='{mode}', whose activations stay float"):
        Quantize(mode=mode, activation_bits=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": "1%", "evaluate": lambda m: 1.0}, r"max_drop='1%'; 0 or more is needed, a number"),
        ({"evaluate": lambda m: None}, r"evaluate returned None \(does it return its score\?\); a finite number"),
        ({"evaluate": lambda m: "good"}, r"evaluate returned str 'good'; a finite number"),
        ({"evaluate": lambda m: torch.ones(2)}, r"evaluate returned Tensor .*; a finite number"),
    ],
)
def test_scores_are_numbers(options, message, monkeypatch):
    monkeypatch.setattr("torchopt.compress.verbs.faster_rules", lambda model, rules, *rest: (list(rules), []))
    with pytest.raises((ConfigError, DataError), match=message):
        torchopt.one_shot(
            net(), [Rule("*", quantize=Quantize(fallback="auto"))], [X], example_inputs=(X[:1],), progress=False, **options
        )


def test_a_finalized_model_in_half_precision_says_what_helps(tmp_path):
    half = torchopt.one_shot(net(), [Rule("*", quantize=Quantize())], [X], example_inputs=(X[:1],), progress=False).eval().half()
    for x in (X, X.half()):
        with pytest.raises(StateError, match=r"was made float16, and its integers are of float32.*mode='float16'"):
            half(x)
    weights = torchopt.finalize(torchopt.prepare(net(), [Rule("*", quantize=Quantize(mode="weight_only"))])).eval().half()
    with pytest.raises(ModelError, match=r"weight was made float16 after finalize.*mode='float16'"):
        torchopt.export(weights, (X[:1],), tmp_path / "m.onnx")


@pytest.mark.parametrize(("low", "size", "pays"), [(1.02, 54, True), (1.10, 54, True), (1.30, 54, False), (1.02, 204, False)])
def test_integers_must_lose_by_more_than_their_bytes_are_worth(low, size, pays):
    row = SimpleNamespace(ratio=low + 0.1, ratio_low=low, size_bytes=size)
    assert (fallback._cost(row, 204) <= 1) is pays


def test_calibrate_has_nothing_to_do_where_all_was_left_float(monkeypatch):
    monkeypatch.setattr("torchopt.compress.verbs.faster_rules", lambda model, rules, *rest: ([Rule("*", quantize=None)], []))
    monkeypatch.setattr("torchopt.compress.verbs._asks_for_ranges", lambda state: True)
    ready = torchopt.prepare(net(), [Rule("*", quantize=Quantize(fallback="auto"))], (X[:1],))
    assert torchopt.calibrate(ready, [X], progress=False) is ready
    assert torch.equal(torchopt.finalize(ready).eval()(X), net()(X))
