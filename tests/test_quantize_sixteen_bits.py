"""Activations of 16 bits beside 8-bit weights: exact files that ONNX Runtime computes in float, and says so."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt.quantize import FixedQuantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
REASON = "its activations have 16 bits, for which ONNX Runtime has no integer kernel"


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.pool, self.head = nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.bn(self.a(x)))
        y = torch.max_pool2d(y + self.act(self.b(y)), 2)
        return self.head(self.pool(y).flatten(1))


NETS = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3)),
    "conv_relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU()),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)),
    "residual": Residual,
}


def baked(make, bits=16, **config):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(4, 3, 8, 8)
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize(activation_bits=bits, **config))]
    return torchopt.one_shot(net, rules, [x], example_inputs=(x,), progress=False).eval(), net, x


@pytest.mark.parametrize("name", NETS)
def test_the_file_is_exact_and_runs_in_float(name, tmp_path):
    final, net, x = baked(NETS[name])
    fixed = [m for m in final.modules() if isinstance(m, FixedQuantize)]
    assert {m.zero_point.dtype for m in fixed} == {torch.uint16}
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert placement.integer == []
    assert {layer.reason for layer in placement.layers} == {REASON}
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert verdict.weights_equal
    assert verdict.weights_compared == len(placement.layers)
    assert verdict.max_abs <= 1.01 * max(float(m.scale) for m in fixed)  # one step of 1/65535 of a range
    with torch.no_grad():
        assert float((final(x) - net(x)).norm() / net(x).norm()) < 0.02


def test_sixteen_bits_round_finer_than_eight():
    """Beside the same model whose activations are not rounded at all, so that the weights' errors are in neither."""
    errors = []
    for bits in (8, 16):
        final, _, x = baked(Residual, bits, observer="minmax")
        plain = copy.deepcopy(final)
        for name, module in final.named_modules():
            if isinstance(module, FixedQuantize):
                plain.set_submodule(name, nn.ReLU() if module.zero_point == 0 else nn.Identity())  # the range was the ReLU
        errors.append(float((final(x) - plain(x)).norm() / plain(x).norm()))
    assert 1e-4 < errors[0] < 0.05
    assert errors[1] < errors[0] / 5  # 257 times finer; what lies outside the calibrated range is cut off by both


def test_the_grid_has_65536_values():
    final, _, x = baked(NETS["conv"], observer="minmax")
    first = next(m for m in final.modules() if isinstance(m, FixedQuantize))
    assert (first.qmin, first.qmax) == (0, 65535)
    np.testing.assert_allclose(float(first.scale), float(x.max() - x.min()) / 65535, rtol=1e-5)
    assert float((first(x) - x).abs().max()) <= 0.51 * float(first.scale)


def test_training_with_sixteen_bits_ends_in_the_last_forward(tmp_path):
    _, net, x = baked(Residual)
    ready = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize(activation_bits=16))], (x,)).train()
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = ready(x).square().mean()
        loss.backward()
        optimizer.step()
        torchopt.step(ready)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    final = torchopt.finalize(ready).eval()
    with torch.no_grad():
        torch.testing.assert_close(final(x), ready.eval()(x), rtol=0, atol=0)
    torchopt.save(final, tmp_path / "m.safetensors")
    again = torchopt.load(tmp_path / "m.safetensors", Residual()).eval()
    torch.testing.assert_close(again(x), final(x), rtol=0, atol=0)


def test_an_older_opset_is_refused(tmp_path):
    final, _, x = baked(NETS["conv"])
    with pytest.raises(torchopt.ModelError, match=r"activations of 16 bits need opset 21, got 17; leave opset out"):
        torchopt.export(final, (x,), tmp_path / "m.onnx", opset=17)


def test_a_layer_left_in_float_between_integers_stays_float(tmp_path):
    """ONNX Runtime would round it with one scale a tensor; a channel 100 times as large shows it."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        net[1].weight[0] *= 100
    rules = [torchopt.Rule(name, quantize=torchopt.Quantize()) for name in ("0", "3")]
    final = torchopt.one_shot(net, rules, [x], example_inputs=(x,), progress=False).eval()
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (placement.integer, placement.float) == (["0.weight", "3.weight"], ["1.weight"])
    last = [m for m in final.modules() if isinstance(m, FixedQuantize)][-1]
    verdict = torchopt.verify(final, tmp_path / "m.onnx", [x], progress=False)
    assert verdict.max_abs <= 1.01 * float(last.scale)
