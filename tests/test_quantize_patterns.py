"""Every fusion pattern on a net of a few lines: the exact operators that ONNX Runtime's optimized graph consists of.

All that is computed is compared, kernels and what stands between them; only the transpositions to and from the kernels' own layout are
not counted, and the Pad that gives a convolution as many input channels as its kernel takes fast. Where ONNX Runtime has no integer
kernel, the float operator that is left stands between two roundings. Other spellings of a pattern belong to the slow tier.
"""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.quantize import FixedQuantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

IMAGES, ROWS, SEQUENCE, SIGNAL, VOLUME = (2, 3, 8, 8), (2, 16), (2, 5, 16), (2, 3, 16), (2, 3, 6, 8, 8)
ENDS = {"QuantizeLinear": 1, "DequantizeLinear": 1}  # of the network
FLOATS = {"QuantizeLinear": 2, "DequantizeLinear": 2}  # and of one float operator within


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=options.pop("padding", kernel // 2), **options)


class Net(nn.Module):
    """Layers a, b, c, d and the code that calls them."""

    def __init__(self, code, *layers: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, layer in zip("abcd", layers):
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)


def between(*modules: nn.Module):
    """conv → modules → conv."""
    return lambda: nn.Sequential(conv(3, 8), *modules, conv(8, 4))


def computed(code, *layers):
    return lambda: Net(code, *(layer() for layer in layers))


def unary(function):
    """conv → function → conv, as code."""
    return computed(lambda m, x: m.b(function(m.a(x))), lambda: conv(3, 8), lambda: conv(8, 4))


def head(pool):
    """conv → relu → pool to (N, 8) → linear."""
    return computed(lambda m, x: m.b(pool(F.relu(m.a(x)))), lambda: conv(3, 8), lambda: nn.Linear(8, 4))


def moved(function, channels: int):
    """conv of 16 channels → relu → function → conv."""
    return computed(lambda m, x: m.b(function(F.relu(m.a(x)))), lambda: conv(3, 16), lambda: conv(channels, 4))


def two(code, *more):
    return computed(code, lambda: conv(3, 8), lambda: conv(8, 8), *more)


def pair(code):
    """Two convolutions of the input, and one of 16 channels."""
    return computed(code, lambda: conv(3, 8), lambda: conv(3, 8), lambda: conv(16, 4))


def squeeze(
    gate, down=lambda: conv(8, 4, 1), up=lambda: conv(4, 8, 1), shape=lambda s: s, pool=lambda y: y.mean((2, 3), keepdim=True)
):
    def code(m, x):
        y = F.relu(m.a(x))
        return m.d(y * shape(gate(m.c(F.relu(m.b(pool(y)))))))

    return computed(code, lambda: conv(3, 8), down, up, lambda: conv(8, 4))


def residual(join):
    def code(m, x):
        y = F.relu(m.a(x))
        return m.c(join(m.b(y), y))

    return two(code, lambda: conv(8, 4))


def attention(m, x):
    return m.d(torch.softmax(m.a(x) @ m.b(x).transpose(1, 2) / 4, -1) @ m.c(x))


def split(m, x):
    one, other = torch.split(F.relu(m.a(x)), [2, 6], 1)
    return m.b(one) + m.c(other)


def chunk(m, x):
    one, other = F.relu(m.a(x)).chunk(2, 1)
    return m.b(one) + m.c(other)


def shuffle(y):
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def convs(count: int, **kernels) -> dict[str, int]:
    return {**ENDS, "QLinearConv": count, **kernels}


def head_of(pool: str, **moves) -> dict[str, int]:
    return {"QuantizeLinear": 1, "QLinearConv": 1, pool: 1, "QGemm": 1, "Add": 1, **moves}  # Add: the float bias of the logits


PATTERNS = {
    # layers, what is absorbed into them
    "conv": (IMAGES, lambda: nn.Sequential(conv(3, 8)), convs(1)),
    "conv, no bias": (IMAGES, lambda: nn.Sequential(conv(3, 8, bias=False)), convs(1)),
    "conv, stride": (IMAGES, lambda: nn.Sequential(conv(3, 8, stride=2)), convs(1)),
    "conv, padding='same'": (IMAGES, lambda: nn.Sequential(conv(3, 8, padding="same")), convs(1)),
    "conv, reflect": (IMAGES, between(nn.ReLU(), conv(8, 8, padding_mode="reflect")), convs(3, Pad=1)),
    "conv, circular": (IMAGES, between(nn.ReLU(), conv(8, 8, padding_mode="circular")), convs(3, Pad=1)),
    "bn": (IMAGES, between(nn.BatchNorm2d(8)), convs(2)),
    "bn relu": (IMAGES, between(nn.BatchNorm2d(8), nn.ReLU()), convs(2)),
    "bn relu6": (IMAGES, between(nn.BatchNorm2d(8), nn.ReLU6()), convs(2)),
    "hardtanh from 0": (IMAGES, between(nn.Hardtanh(0.0, 0.5)), convs(2)),
    "relu": (IMAGES, between(nn.ReLU()), convs(2)),
    "F.relu": (IMAGES, unary(F.relu), convs(2)),
    "Tensor.relu": (IMAGES, unary(lambda y: y.relu()), convs(2)),
    "F.relu6": (IMAGES, unary(F.relu6), convs(2)),
    "F.hardtanh": (IMAGES, unary(lambda y: F.hardtanh(y, 0.0, 0.5)), convs(2)),
    "clamp": (IMAGES, unary(lambda y: y.clamp(0, 6)), convs(2)),
    "clamp from 0": (IMAGES, unary(lambda y: torch.clamp(y, min=0)), convs(2)),
    "clamp_min": (IMAGES, unary(lambda y: y.clamp_min(0)), convs(2)),
    "two relus": (IMAGES, between(nn.ReLU(), nn.ReLU6()), convs(2)),
    "depthwise": (IMAGES, between(nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6()), convs(3)),
    "depthwise, multiplier": (IMAGES, lambda: nn.Sequential(conv(3, 6, groups=3), nn.ReLU(), conv(6, 4, 1)), convs(2)),
    "grouped": (IMAGES, between(nn.ReLU(), conv(8, 8, groups=2), nn.ReLU()), convs(3)),
    "dilated": (IMAGES, between(nn.ReLU(), conv(8, 8, dilation=2, padding=2), nn.ReLU()), convs(3)),
    "conv1d": (SIGNAL, lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1)), convs(2)),
    "conv1d max": (SIGNAL, lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool1d(2)), convs(1, NhwcMaxPool=1)),
    "conv1d average": (
        SIGNAL,
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.AvgPool1d(2)),
        convs(1, QLinearAveragePool=1),
    ),
    "conv3d": (VOLUME, lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1)), convs(2)),
    "conv3d max": (VOLUME, lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.MaxPool3d(2)), convs(1, NhwcMaxPool=1)),
    "transposed": (
        IMAGES,
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        convs(2, Reshape=2),  # one convolution, its channels spread over the pixels
    ),
    "linear": (
        ROWS,
        lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
        {"QuantizeLinear": 1, "QGemm": 2, "Add": 1},
    ),
    "linear bn": (
        ROWS,
        lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
        {"QuantizeLinear": 1, "QGemm": 2, "Add": 1},
    ),
    "linear, sequence": (
        SEQUENCE,
        lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
        {
            "QuantizeLinear": 2,
            "MatMulIntegerToFloat": 2,
            "Add": 2,
        },  # a product gives floats at no cost; a ReLU is in the rounding
    ),
    # what changes values
    "add": (IMAGES, residual(lambda y, z: y + z), convs(3, QLinearAdd=1)),
    "add relu": (IMAGES, residual(lambda y, z: F.relu(y + z)), convs(3, QLinearAdd=1)),
    "add, in place": (IMAGES, residual(lambda y, z: F.relu_(y.add_(z))), convs(3, QLinearAdd=1)),
    "+=": (IMAGES, residual(lambda y, z: (y.__iadd__(z)).clamp_(0, 6)), convs(3, QLinearAdd=1)),
    "torch.add": (IMAGES, residual(torch.add), convs(3, QLinearAdd=1)),
    "product": (IMAGES, residual(lambda y, z: y * z), convs(3, QLinearMul=1)),
    "leaky relu": (IMAGES, between(nn.LeakyReLU(0.1)), convs(2, QLinearLeakyRelu=1)),
    "F.leaky_relu": (IMAGES, unary(lambda y: F.leaky_relu(y, 0.1)), convs(2, QLinearLeakyRelu=1)),
    "sigmoid": (IMAGES, between(nn.Sigmoid()), convs(2, QLinearSigmoid=1)),
    "torch.sigmoid": (IMAGES, unary(torch.sigmoid), convs(2, QLinearSigmoid=1)),
    "hardsigmoid": (IMAGES, between(nn.Hardsigmoid()), convs(2, QLinearAdd=1)),
    "hardswish": (IMAGES, between(nn.Hardswish()), convs(2, QLinearAdd=1, QLinearMul=1)),
    "silu": (IMAGES, between(nn.SiLU()), convs(2, QLinearSigmoid=1, QLinearMul=1)),
    "x·sigmoid(x)": (IMAGES, unary(lambda y: y * torch.sigmoid(y)), convs(2, QLinearSigmoid=1, QLinearMul=1)),
    "average pool": (IMAGES, between(nn.ReLU(), nn.AvgPool2d(2)), convs(2, QLinearAveragePool=1)),
    "average pool, padded": (IMAGES, between(nn.ReLU(), nn.AvgPool2d(3, 1, 1)), convs(2, QLinearAveragePool=1)),
    "F.avg_pool2d": (IMAGES, unary(lambda y: F.avg_pool2d(F.relu(y), 2)), convs(2, QLinearAveragePool=1)),
    "global pool": (
        IMAGES,
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        head_of("QLinearGlobalAveragePool", Reshape=1),
    ),
    "F.adaptive_avg_pool2d": (
        IMAGES,
        head(lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1)),
        head_of("QLinearGlobalAveragePool", Reshape=1),
    ),
    "mean": (IMAGES, head(lambda y: y.mean((2, 3))), head_of("QLinearGlobalAveragePool", Flatten=1)),
    "torch.mean": (IMAGES, head(lambda y: torch.mean(y, [2, 3])), head_of("QLinearGlobalAveragePool", Flatten=1)),
    "pool to 2×2": (IMAGES, unary(lambda y: F.adaptive_avg_pool2d(F.relu(y), 2)), convs(2, QLinearAveragePool=1)),
    "squeeze and excitation": (
        IMAGES,
        squeeze(torch.sigmoid),
        convs(4, QLinearGlobalAveragePool=1, QLinearSigmoid=1, QLinearMul=1),
    ),
    "squeeze and excitation, hard": (
        IMAGES,
        squeeze(F.hardsigmoid),
        convs(4, QLinearGlobalAveragePool=1, QLinearAdd=1, QLinearMul=1),
    ),
    "squeeze and excitation, linear": (
        IMAGES,
        squeeze(
            torch.sigmoid,
            down=lambda: nn.Linear(8, 4),
            up=lambda: nn.Linear(4, 8),
            shape=lambda s: s[:, :, None, None],
            pool=lambda y: y.mean((2, 3)),
        ),
        convs(2, QLinearGlobalAveragePool=1, Flatten=1, QGemm=2, QLinearSigmoid=1, Unsqueeze=2, QLinearMul=1),
    ),
    "bn after concat": (
        IMAGES,
        computed(
            lambda m, x: m.c(F.relu(m.d(torch.cat([m.a(x), m.b(x)], 1)))),
            lambda: conv(3, 8),
            lambda: conv(3, 8),
            lambda: conv(16, 4),
            lambda: nn.BatchNorm2d(16),
        ),
        convs(4, QLinearConcat=1),
    ),
    # what moves values
    "concat, same signs": (
        IMAGES,
        pair(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1))),
        convs(3, QLinearConcat=1),
    ),
    "concat, mixed signs": (IMAGES, pair(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x)], 1))), convs(3, QLinearConcat=1)),
    "max pool": (IMAGES, between(nn.ReLU(), nn.MaxPool2d(2)), convs(2, NhwcMaxPool=1)),
    "F.max_pool2d": (IMAGES, unary(lambda y: F.max_pool2d(F.relu(y), 2)), convs(2, NhwcMaxPool=1)),
    "reshape": (
        IMAGES,
        computed(lambda m, x: m.b(F.relu(m.a(x)).reshape(x.shape[0], -1)), lambda: conv(3, 8), lambda: nn.Linear(512, 4)),
        {"QuantizeLinear": 1, "QLinearConv": 1, "Reshape": 1, "QGemm": 1, "Add": 1},
    ),
    "view": (
        IMAGES,
        computed(lambda m, x: m.b(F.relu(m.a(x)).view(x.size(0), -1)), lambda: conv(3, 8), lambda: nn.Linear(512, 4)),
        {"QuantizeLinear": 1, "QLinearConv": 1, "Reshape": 1, "QGemm": 1, "Add": 1},
    ),
    "permute": (
        IMAGES,
        computed(lambda m, x: m.b(F.relu(m.a(x)).permute(0, 2, 3, 1)), lambda: conv(3, 8), lambda: nn.Linear(8, 4)),
        {"QuantizeLinear": 1, "QLinearConv": 1, "MatMulIntegerToFloat": 1, "Add": 1},
    ),
    "chunk": (
        IMAGES,
        computed(chunk, lambda: conv(3, 8), lambda: conv(4, 4), lambda: conv(4, 4)),
        convs(3, Split=1, QLinearAdd=1),
    ),
    "split": (
        IMAGES,
        computed(split, lambda: conv(3, 8), lambda: conv(2, 4), lambda: conv(6, 4)),
        convs(3, Split=1, QLinearAdd=1),
    ),
    "channel shuffle": (IMAGES, moved(shuffle, 16), convs(2, Reshape=2)),
    "nn.ChannelShuffle": (IMAGES, between(nn.ReLU(), nn.ChannelShuffle(2)), convs(2, Reshape=2)),
    "pixel shuffle": (IMAGES, moved(lambda y: F.pixel_shuffle(y, 2), 4), convs(2, DepthToSpace=1)),
    "nn.PixelShuffle": (
        IMAGES,
        lambda: nn.Sequential(conv(3, 16), nn.ReLU(), nn.PixelShuffle(2), conv(4, 4)),
        convs(2, DepthToSpace=1),
    ),
    "zero pad": (IMAGES, between(nn.ReLU(), nn.ZeroPad2d(1)), convs(2, Pad=1)),
    "F.pad": (IMAGES, unary(lambda y: F.pad(F.relu(y), (1, 1, 0, 0))), convs(2, Pad=1)),
    "crop": (IMAGES, unary(lambda y: F.relu(y)[:, :, 1:-1]), convs(2, Slice=1)),
    "nearest": (IMAGES, between(nn.ReLU(), nn.Upsample(scale_factor=2)), convs(2, Resize=1)),
    "F.interpolate": (IMAGES, unary(lambda y: F.interpolate(F.relu(y), scale_factor=2)), convs(2, Resize=1)),
    "dropout": (IMAGES, between(nn.ReLU(), nn.Dropout2d()), convs(2)),
    # what stays float
    "hardtanh around 0": (IMAGES, between(nn.Hardtanh(-0.5, 0.4)), convs(2)),
    "gelu": (IMAGES, between(nn.GELU()), {**FLOATS, "QLinearConv": 2, "Gelu": 1}),
    "bilinear": (IMAGES, between(nn.Upsample(scale_factor=2, mode="bilinear")), {**FLOATS, "QLinearConv": 2, "Resize": 1}),
    "layer norm": (
        SEQUENCE,
        lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)),
        {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2, "Add": 2, "LayerNormalization": 1},
    ),
    "softmax": (
        SEQUENCE,
        lambda: nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1), nn.Linear(16, 4)),
        {"QuantizeLinear": 2, "MatMulIntegerToFloat": 2, "Add": 2, "Softmax": 1},
    ),
    "attention": (
        SEQUENCE,
        computed(attention, *[lambda: nn.Linear(16, 16)] * 4),
        {"QuantizeLinear": 2, "MatMulIntegerToFloat": 4, "Add": 4, "FusedMatMul": 1, "MatMul": 1, "Softmax": 1},
    ),
}


SPELLINGS = {
    "conv, no bias", "conv, stride", "conv, padding='same'", "conv, circular", "relu", "F.relu", "Tensor.relu", "F.relu6", "F.hardtanh",
    "clamp from 0", "clamp_min", "add, in place", "+=", "torch.add", "F.leaky_relu", "torch.sigmoid", "x·sigmoid(x)", "F.avg_pool2d",
    "F.adaptive_avg_pool2d", "torch.mean", "F.max_pool2d", "split", "nn.ChannelShuffle", "nn.PixelShuffle", "F.interpolate", "dropout",
    "conv1d average", "conv3d max", "view", "zero pad", "squeeze and excitation, linear", "average pool, padded",
}  # fmt: skip


def with_statistics(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)  # negative factors flip the integers
    return net.eval()


def tier(name: str):
    return pytest.param(name, marks=pytest.mark.slow) if name in SPELLINGS else name


@pytest.mark.parametrize("name", [tier(name) for name in PATTERNS])
def test_operators_of_the_optimized_graph(name, tmp_path):
    shape, make, expected = PATTERNS[name]
    torch.manual_seed(0)
    net, x = with_statistics(make()), torch.randn(shape)
    rule = Rule("*", quantize=Quantize(observer="minmax", rounding="nearest"))
    ready = torchopt.calibrate(torchopt.prepare(net, [rule], (x[:1],)), [x], progress=False).eval()
    final = torchopt.finalize(ready).eval()
    torchopt.export(final, (x[:1],), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    skipped = {"Transpose", "Pad"} - set(expected)
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node if node.op_type not in skipped)
    assert found == expected
    with torch.no_grad():
        ours, floats = final(x).numpy(), net(x).numpy()
        np.testing.assert_allclose(ready(x).numpy(), ours, rtol=0, atol=1e-6)  # evaluation is what is deployed
    theirs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    step = max(float(m.scale) for m in final.modules() if isinstance(m, FixedQuantize))
    assert np.abs(theirs - ours).max() <= 1.01 * step
    assert 10 * np.log10(np.square(floats).sum() / np.square(floats - ours).sum()) > 30  # dB


@pytest.mark.parametrize("name", PATTERNS)
def test_Q12_without_rounding_every_rewritten_graph_is_the_float_network(name):
    shape, make, _ = PATTERNS[name]
    torch.manual_seed(0)
    net, x = with_statistics(make()), torch.randn(shape)
    ready = torchopt.prepare(net, [Rule("*", quantize=Quantize(milestones=[100, 100, 100]))], (x[:1],)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ready(x), net(x), rtol=1e-4, atol=1e-5)
