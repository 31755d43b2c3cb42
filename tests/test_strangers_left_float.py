"""Each weight without integers has its row and its reason in `report`, and its line in `inspect`, also after `finalize`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt

OWN = "is read by code of the model's own, not as the weight of a known layer; it stays float"


class Standardized(nn.Conv2d):
    """Computes its weight from its parameter in each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Flow(nn.Module):
    """A parameter that forward reads by itself, a copy of another layer's weight, and a layer that no rule names."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(8) + 0.1)
        self.a, self.b, self.free = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(self.b(F.relu(self.a(x @ self.mix))))


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_parameters_of_own_code_and_layers_without_a_rule(tmp_path, mode) -> None:
    torch.manual_seed(0)
    net, x = Flow().eval(), torch.randn(16, 8)
    rules = [torchopt.Rule(name, quantize=torchopt.Quantize(mode=mode)) for name in "ab"]
    final = torchopt.one_shot(net, rules, [x], example_inputs=(x[:1],), progress=False)
    found = torchopt.report(final)
    assert sorted(row.name for row in found.rows) == ["a.weight", "b.weight", "free.weight", "mix"]
    assert {skip.name: skip.reason for skip in found.skipped} == {
        "mix": OWN,
        "free.weight": "no rule quantizes it, or its layer was left float; it stays float",
    }
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    layers = {layer.name: layer for layer in torchopt.inspect(tmp_path / "m.onnx").layers}
    assert sorted(layers) == ["a.weight", "b.weight", "free.weight", "mix"]
    assert {name: layer.integer for name, layer in layers.items()} == {
        "a.weight": mode == "static", "b.weight": mode == "static", "free.weight": False, "mix": False,
    }  # fmt: skip
    assert layers["mix"].reason == layers["free.weight"].reason == "its weight is float"


def test_a_table_on_a_parameter_that_forward_reads_is_copied_and_baked() -> None:
    """Two values are found in it, as an earlier round would have left them."""
    torch.manual_seed(0)
    net, x = Flow().eval(), torch.randn(16, 8)
    ready = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize())], example_inputs=(x[:1],))
    torchopt.calibrate(ready, [x], progress=False)
    assert "parametrizations.mix.original" in dict(ready.named_parameters())
    final = torchopt.finalize(ready)
    torch.testing.assert_close(final.mix, net.mix, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(final(x), ready.eval()(x), rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(ready)(x), ready(x), rtol=0, atol=0)


def test_standardized_convolutions_are_in_both_tables(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), torch.randn(8, 3, 8, 8)
    final = torchopt.one_shot(
        net, [torchopt.Rule("*", quantize=torchopt.Quantize())], [x], example_inputs=(x[:1],), progress=False
    )
    found = torchopt.report(final)
    assert sorted(row.name for row in found.rows) == ["0.weight", "2.weight"]
    (skip,) = found.skipped
    assert (skip.name, skip.technique) == ("0", "quantize")
    assert "computes another weight from it in each call" in skip.reason
    torchopt.export(final, (x[:1],), tmp_path / "m.onnx", pack=False)
    layers = torchopt.inspect(tmp_path / "m.onnx").layers
    assert [(layer.name, layer.integer) for layer in layers] == [("0.weight", False), ("2.weight", True)]
    assert layers[0].reason == "its weight is computed in float from 0.weight, at load"


def test_what_finalize_left_alone_is_told_afterwards() -> None:
    net = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 8))
    ready = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize(mode="dynamic"))])
    before = torchopt.report(ready).skipped
    assert [skip.name for skip in before] == ["0"]
    assert torchopt.report(torchopt.finalize(ready)).skipped == before


def test_a_float_copy_of_a_weight_of_integers_is_named() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ready = torchopt.prepare(net, [torchopt.Rule("0", quantize=torchopt.Quantize(mode="weight_only"))])
    final = torchopt.finalize(ready)
    final[1].weight.data.copy_(final[0].weight)
    assert [(s.name, s.reason) for s in torchopt.report(final).skipped] == [
        ("1.weight", "has the values of 0.weight, which is written as integers; this copy stays float")
    ]


def test_float_models_and_half_precision_need_no_reasons() -> None:
    assert torchopt.report(Flow()).skipped == []
    assert [row.name for row in torchopt.report(Flow()).rows] == ["a.weight", "b.weight", "free.weight", "mix"]
    ready = torchopt.prepare(nn.Sequential(nn.Linear(16, 16)), [torchopt.Rule("*", quantize=torchopt.Quantize(mode="float16"))])
    assert torchopt.report(torchopt.finalize(ready)).skipped == []


def test_parts_of_a_parametrization_are_no_rows_of_their_own() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)))
    assert [row.name for row in torchopt.report(net).rows] == ["0.weight"]
