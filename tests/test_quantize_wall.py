"""What quantization does to be quick computes the same: folding once, working in place, probing weights, one look at a batch."""

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.compress.existing import left_behind
from torchopt.errors import DataError
from torchopt.network.weights import weights
from torchopt.quantize.calibration.folding import folded_once
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.modules import Fused

NEAREST = [Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Hardtanh(0.0, 2.0)
    ).eval()


def test_folded_layers_work_in_place_and_give_the_same():
    x = torch.randn(2, 3, 8, 8)
    ready = torchopt.prepare(network(), NEAREST, (x,)).eval()
    layers = [m for m in ready.modules() if isinstance(m, Fused)]
    expected = ready(x)
    with torch.no_grad(), folded_once(layers):
        assert [layer.act.inplace for layer in layers] == [True, True]
        torch.testing.assert_close(ready(x), expected, rtol=0, atol=1e-6)
    assert [layer.act.inplace for layer in layers] == [False, False]


def test_ranges_are_the_extremes_of_all_batches():
    net = network()
    batches = [torch.randn(6, 3, 8, 8), torch.randn(5, 3, 8, 8)]
    ready = torchopt.calibrate(torchopt.prepare(net, NEAREST, (batches[0],)), batches, progress=False)
    ranges = {(float(m.min_val), float(m.max_val)) for m in ready.modules() if isinstance(m, ActivationQuantizer)}
    x = torch.cat(batches)
    assert (float(x.min()), float(x.max())) in ranges
    assert {low for low, _ in ranges if low > -1} == {0.0}  # after ReLU6 and after Hardtanh


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found(value):
    batch = torch.randn(4, 3, 8, 8)
    ready = torchopt.prepare(network(), NEAREST, (batch,))
    batch[3, 2, 7, 7] = value
    with pytest.raises(DataError, match="batch 0 holds NaN or infinity"):
        torchopt.calibrate(ready, [batch], progress=False)


def test_a_row_that_repeats_few_values_is_no_table():
    layer = nn.Linear(1024, 64, bias=False)
    with torch.no_grad():
        layer.weight[0] = torch.tensor([0.25, 0.5]).repeat(512)
    assert left_behind(weights(layer)) == {}
    layer.weight.data = torch.tensor([0.25, 0.5, 0.75, 1.0]).repeat(64 * 256).reshape(64, 1024)
    assert left_behind(weights(layer)) == {"weight": (0, 4)}
