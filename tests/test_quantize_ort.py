"""Each fusion pattern on a small net: the exact operators that ONNX Runtime runs, and the same numbers as torch."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import torchopt
from torchopt.quantize import FixedQuantize


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.relu = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x):
        y = self.relu(self.bn(self.a(x)))
        return self.relu(self.b(y) + y).flatten(1)


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.c(torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1))


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        one, two = self.a(x).chunk(2, dim=1)
        y = torch.cat([one, self.b(two)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Norm(nn.Module):
    """DenseNet's order: batch norm after a concatenation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.c(torch.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1))))


def stack(*layers):
    return nn.Sequential(*layers)


NETS = {
    "conv": (lambda: stack(nn.Conv2d(3, 8, 3)), {"QLinearConv": 1}),
    "conv_bn": (lambda: stack(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), {"QLinearConv": 1}),
    "conv_relu": (lambda: stack(nn.Conv2d(3, 8, 3), nn.ReLU()), {"QLinearConv": 1}),
    "conv_bn_relu": (lambda: stack(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), {"QLinearConv": 1}),
    "conv_bn_relu6": (lambda: stack(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()), {"QLinearConv": 1}),
    "conv_hardtanh": (lambda: stack(nn.Conv2d(3, 8, 3), nn.Hardtanh(0.0, 2.0)), {"QLinearConv": 1}),
    "depthwise": (lambda: stack(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU6()), {"QLinearConv": 1}),
    "dilated": (lambda: stack(nn.Conv2d(3, 6, 3, dilation=2, padding=2), nn.ReLU()), {"QLinearConv": 1}),
    "max_pool": (
        lambda: stack(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)),
        {"QLinearConv": 2, "NhwcMaxPool": 1},
    ),
    "head": (
        lambda: stack(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1, "Add": 1},  # the float bias of the logits
    ),
    "linear_relu": (lambda: stack(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)), {"QGemm": 2, "Add": 1}),
    "residual": (Residual, {"QLinearConv": 2, "QLinearAdd": 1}),
    "concat": (Concat, {"QLinearConv": 3}),
    "shuffle": (Shuffle, {"QLinearConv": 2}),
    "lone_bn": (Norm, {"QLinearConv": 4}),
}
FLOAT = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "Relu", "Clip", "Add", "Mul", "BatchNormalization", "ReduceMean"}


def prepared(make, shape=(4, 3, 8, 8), **config):
    torch.manual_seed(0)
    net, x = make(), torch.randn(shape)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)  # negative factors flip the integers
    return torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize(**config))], (x,)).eval(), x


def baked(make, **config):
    ready, x = prepared(make, **config)
    torchopt.calibrate(ready, [x, x], progress=False)
    return torchopt.finalize(ready).eval(), ready, x


def optimized(path, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", NETS)
def test_runs_as_integers(name, tmp_path):
    make, expected = NETS[name]
    final, ready, x = baked(make)
    with torch.no_grad():
        ours = final(x)
        torch.testing.assert_close(ready(x), ours, rtol=0, atol=0)  # evaluation is what is deployed, bit for bit
    torchopt.export(final, (x,), tmp_path / "model.onnx")
    session, ops = optimized(tmp_path / "model.onnx", tmp_path)
    assert {op: ops[op] for op in expected} == expected, ops
    assert not (FLOAT - set(expected)) & set(ops), ops
    theirs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    step = max(float(m.scale) for m in final.modules() if isinstance(m, FixedQuantize))
    assert np.abs(theirs - ours.numpy()).max() <= 1.01 * step


def test_names_stay_and_weights_lie_on_their_grid():
    final, _, _ = baked(NETS["head"][0])
    grids = torchopt.network.grid.grids(final)
    assert list(grids) == ["0.weight", "4.weight"]
    assert type(final.get_submodule("0")) is nn.Conv2d
    assert grids["0.weight"].codes(final.get_submodule("0").weight).abs().amax() == 127
    assert not any(type(m).__module__.startswith("torch.ao") for m in final.modules())


def test_a_negative_batch_norm_factor_flips_the_integers():
    torch.manual_seed(0)
    net = stack(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0))
    net[0].weight.data.fill_(0.5)
    net[1].weight.data.fill_(-2.0)
    ready = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize())], (torch.ones(1, 1, 2, 2),)).eval()
    torchopt.calibrate(ready, [torch.ones(1, 1, 2, 2)], progress=False)
    final = torchopt.finalize(ready)
    grid = torchopt.network.grid.grids(final)["0.weight"]
    assert grid.codes(final.get_submodule("0").weight).item() == -127
    np.testing.assert_allclose(grid.scale.item(), 1 / 127, rtol=1e-6)
